# Evaluates a plugin (default.nix) or a config (config.nix) of the bash nixbox, and describes what it comes to.
#
# nixbox/image/nixeval.py hands this over on standard input, with its argument: the store is a dummy, evaluation is
# restricted to `directory`, and nothing is fetched or built. Here is the second wall: the file, and whatever it
# imports, sees `builtins` of ours (scopedImport), with no fetcher, no derivation and no environment but `variables`.
# No nixpkgs is needed: `pkgs` and `lib` are stand-ins.
#
# The result is a tree of lists, one for each value, that begin with what it is (`describe`, below).
{
  file, # path of the file
  directory, # text: what lies in it may be read
  names, # every identifier in the file and in what it imports: the attributes of `pkgs`
  variables, # what builtins.getEnv answers; "" for any other name
  system, # "x86_64-linux"
}:
let
  real = builtins;
  setOf =
    value: list:
    real.listToAttrs (
      map (name: {
        inherit name;
        value = value name;
      }) list
    );

  # --- marks -------------------------------------------------------------------------------------------------
  # Nix carries the context of a string (the store paths that it depends on) through every operation on strings.
  # A made-up store path there says, however a text was put together, which variable or package is in it.
  marked =
    kind: text:
    real.appendContext text {
      "${real.storeDir}/${"00000000000000000000000000000000"}-nixbox-${kind}" = {
        path = true;
      };
    };
  again = # the marks of a text for a part of it
    from: part:
    if real.isString part then real.appendContext part (real.getContext from) else part;

  # --- pkgs: each attribute stands for the package of its own name -------------------------------------------
  package =
    path:
    below "${path}."
    // {
      nixboxPackage = path;
      type = "derivation";
      name = path;
      pname = path;
      outPath = marked "package" "/nixbox-package:${path}:";
      __toString = self: self.outPath;
      __functor = _: _: called path;
    };
  called = path: {
    nixboxCall = path;
    outPath = marked "package" "/nixbox-package:${path}(…):";
    __toString = self: self.outPath;
    __functor = self: _: self;
  };
  below = prefix: setOf (name: package "${prefix}${name}") names;
  written = path: head: name: text: called path // { nixboxText = "${head}${text}"; };
  platform = {
    inherit system;
    isLinux = true;
    isDarwin = false;
    isx86_64 = system == "x86_64-linux";
    isAarch64 = system == "aarch64-linux";
  };
  pkgs =
    # In `with lib; with pkgs;` the functions of lib stay what they are.
    removeAttrs (below "") (real.attrNames lib)
    // {
      inherit lib pkgs system;
      stdenv =
        package "stdenv"
        // platform
        // {
          hostPlatform = platform;
        };
      writeText = written "writeText" "";
      writeScript = written "writeScript" "";
      writeShellScript = written "writeShellScript" "#!/usr/bin/env bash\n";
    };

  # --- lib: what a plugin is likely to use -------------------------------------------------------------------
  lib = rec {
    inherit (safe)
      all
      any
      attrNames
      attrValues
      concatLists
      concatMap
      concatStringsSep
      elem
      elemAt
      filter
      foldl'
      fromJSON
      genList
      hasAttr
      head
      isAttrs
      isBool
      isFunction
      isInt
      isList
      isString
      length
      listToAttrs
      mapAttrs
      match
      readFile
      removeAttrs
      replaceStrings
      stringLength
      substring
      tail
      throw
      trace
      ;
    inherit (safe) split;
    id = x: x;
    const = x: _: x;
    mkDefault = id;
    mkForce = id;
    mkBefore = id;
    mkAfter = id;
    optional = condition: x: if condition then [ x ] else [ ];
    optionals = condition: list: if condition then list else [ ];
    optionalString = condition: text: if condition then text else "";
    optionalAttrs = condition: set: if condition then set else { };
    last = list: elemAt list (length list - 1);
    flatten = x: if isList x then concatMap flatten x else [ x ];
    unique = foldl' (seen: x: if elem x seen then seen else seen ++ [ x ]) [ ];
    subtractLists = out: filter (x: !(elem x out));
    range = from: to: if from > to then [ ] else genList (n: from + n) (to - from + 1);
    concatStrings = concatStringsSep "";
    concatMapStrings = f: list: concatStrings (map f list);
    concatMapStringsSep = by: f: list: concatStringsSep by (map f list);
    concatLines = concatMapStrings (line: line + "\n");
    splitString = by: text: filter isString (split (escapeRegex by) text);
    escapeRegex = replaceStrings (special) (map (c: "\\" + c) special);
    special = [
      "\\"
      "^"
      "$"
      "."
      "*"
      "+"
      "?"
      "("
      ")"
      "["
      "]"
      "{"
      "}"
      "|"
    ];
    hasPrefix = start: text: substring 0 (stringLength start) text == start;
    hasSuffix = end: text: stringLength text >= stringLength end && dropped end text == end;
    dropped = end: text: substring (stringLength text - stringLength end) (-1) text;
    hasInfix = part: text: length (split (escapeRegex part) text) > 1;
    removePrefix =
      start: text: if hasPrefix start text then substring (stringLength start) (-1) text else text;
    removeSuffix =
      end: text:
      if hasSuffix end text then substring 0 (stringLength text - stringLength end) text else text;
    escapeShellArg = x: "'${replaceStrings [ "'" ] [ "'\\''" ] (toString x)}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    fileContents = path: removeSuffix "\n" (readFile path);
    importJSON = path: fromJSON (readFile path);
    toInt = text: fromJSON text;
    nameValuePair = name: value: { inherit name value; };
    genAttrs = list: f: setOf f list;
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    mapAttrs' = f: set: listToAttrs (mapAttrsToList f set);
    filterAttrs =
      keep: set: removeAttrs set (filter (name: !(keep name set.${name})) (attrNames set));
    concatMapAttrs = f: set: foldl' (a: b: a // b) { } (mapAttrsToList f set);
    mergeAttrsList = foldl' (a: b: a // b) { };
    recursiveUpdate =
      a: b:
      a
      // mapAttrs (
        name: x: if isAttrs x && isAttrs (a.${name} or null) then recursiveUpdate a.${name} x else x
      ) b;
    strings = lib;
    lists = lib;
    attrsets = lib;
    trivial = lib;
  };

  # --- builtins ----------------------------------------------------------------------------------------------
  # A list of what is there, not of what is not: a builtin that a newer Nix adds has to be looked at first. Left out
  # on purpose is also what would take a mark away.
  kept = [
    "add"
    "addErrorContext"
    "all"
    "any"
    "attrNames"
    "attrValues"
    "baseNameOf"
    "bitAnd"
    "bitOr"
    "bitXor"
    "catAttrs"
    "ceil"
    "concatLists"
    "concatMap"
    "concatStringsSep"
    "deepSeq"
    "dirOf"
    "div"
    "elem"
    "elemAt"
    "false"
    "filter"
    "floor"
    "foldl'"
    "functionArgs"
    "genList"
    "genericClosure"
    "getAttr"
    "groupBy"
    "hasAttr"
    "head"
    "intersectAttrs"
    "isAttrs"
    "isBool"
    "isFloat"
    "isFunction"
    "isInt"
    "isList"
    "isNull"
    "isPath"
    "isString"
    "langVersion"
    "length"
    "lessThan"
    "listToAttrs"
    "map"
    "mapAttrs"
    "mul"
    "nixVersion"
    "null"
    "partition"
    "readDir"
    "readFile"
    "readFileType"
    "removeAttrs"
    "replaceStrings"
    "seq"
    "sort"
    "splitVersion"
    "stringLength"
    "sub"
    "substring"
    "tail"
    "toJSON"
    "toPath"
    "toString"
    "trace"
    "true"
    "tryEval"
    "typeOf"
    "unsafeGetAttrPos"
    "zipAttrsWith"
  ];
  # Functions, so that an error names the place of the call: Nix 2.8 does not for builtins that throw.
  refused =
    name:
    let
      error = real.throw "builtins.${name} is not available here: the file is read without network, builds and other files";
    in
    if real.isFunction real.${name} then _: error else error;
  safe =
    setOf refused (real.attrNames real)
    // setOf (name: real.${name}) (real.filter (name: real ? ${name}) kept)
    // {
      builtins = safe;
      currentSystem = system;
      throw = message: real.throw message;
      abort = message: real.abort message;
      import =
        path: if real.isAttrs path && path ? nixboxImport then path.nixboxImport else load path;
      findFile =
        _: name:
        if name == "nixpkgs" then
          { nixboxImport = _: pkgs; }
        else if name == "nixpkgs/lib" then
          { nixboxImport = lib; }
        else
          real.throw "<${name}> is not available here: only <nixpkgs> is, and no other search path";
      nixPath = [ ];
      # Outside it would answer "no" to every question, in restricted mode.
      pathExists =
        path:
        let
          text = real.unsafeDiscardStringContext (toString path);
          inside = text == directory || lib.hasPrefix "${directory}/" text;
        in
        if inside && real.match ".*/\\.\\.(/.*)?" text == null then
          real.pathExists path
        else
          real.throw "builtins.pathExists is answered for files in ${directory} only";
      getEnv =
        name:
        if real.match "[A-Za-z_][A-Za-z0-9_]*" name == null then
          ""
        else
          marked "variable.${name}" (variables.${name} or "");
      match =
        pattern: text:
        let
          found = real.match pattern text;
        in
        if found == null then null else map (again text) found;
      split =
        pattern: text:
        map (part: if real.isList part then map (again text) part else again text part) (
          real.split pattern text
        );
      fromJSON =
        text:
        let
          found = real.fromJSON (real.unsafeDiscardStringContext text);
        in
        if real.getContext text == { } || !(real.isAttrs found || real.isList found || real.isString found) then
          found
        else
          real.throw "builtins.fromJSON reads no more than a number from a variable of the host";
      fromTOML = text: real.fromTOML (unmarked "fromTOML" text);
      compareVersions = a: b: real.compareVersions (plain a) (plain b);
      hashString = kind: text: real.hashString kind (unmarked "hashString" text);
    };
  plain = real.unsafeDiscardStringContext;
  unmarked =
    name: text:
    if real.getContext text == { } then
      text
    else
      real.throw "builtins.${name} does not take a variable of the host or a package";

  # What a file sees besides its own: every builtin has a second name with `__`, and these have one without.
  bare = real.filter (name: real ? ${name}) [
    "abort"
    "derivation"
    "derivationStrict"
    "fetchClosure"
    "fetchFinalTree"
    "fetchGit"
    "fetchMercurial"
    "fetchTarball"
    "fetchTree"
    "fromTOML"
    "import"
    "placeholder"
    "scopedImport"
    "throw"
  ];
  scope =
    real.listToAttrs (
      map (name: {
        name = "__${name}";
        value = safe.${name};
      }) (real.attrNames safe)
    )
    // setOf (name: safe.${name}) bare
    // {
      builtins = safe;
    };
  load = real.scopedImport scope;

  # --- the file's own function -------------------------------------------------------------------------------
  # `{ pkgs, lib ? …, ... }:` gets what it asks for, `pkgs:` and `{ ... }@args:` get pkgs, which holds itself.
  apply =
    function:
    let
      asked = real.functionArgs function;
      ours = { inherit pkgs lib; };
      needed = lib.filterAttrs (_: optional: !optional) asked;
    in
    function (
      if asked == { } then pkgs else real.intersectAttrs needed pkgs // real.intersectAttrs asked ours
    );

  # --- the answer --------------------------------------------------------------------------------------------
  # Fields two levels deep are traced: Nix 2.8 does not say where its stack overflowed.
  describe =
    path: depth: value:
    let
      type = real.typeOf value;
      inner = describe path (depth + 1);
      attribute =
        name:
        let
          place = real.unsafeGetAttrPos name value;
          here = path ++ [ name ];
          at = if place == null then null else [ place.file place.line ];
          field = describe here (depth + 1) value.${name};
        in
        [
          name
          at
          (
            if depth < 2 then
              real.trace "nixbox-at ${real.toJSON ([ (lib.concatStringsSep "." here) ] ++ (if at == null then [ ] else at))}" field
            else
              field
          )
        ];
    in
    if depth > 8 then
      [ "deep" ]
    else if type == "string" then
      [
        "text"
        (plain value)
        (real.attrNames (real.getContext value))
      ]
    else if type == "path" then
      [
        "path"
        (toString value)
      ]
    else if type == "list" then
      [
        "list"
        (map inner value)
      ]
    else if type == "lambda" then
      [ "function" ]
    else if type != "set" then
      [
        "plain"
        value
      ]
    else if value ? nixboxPackage then
      [
        "package"
        value.nixboxPackage
      ]
    else if value ? nixboxText then
      inner value.nixboxText
    else if value ? nixboxCall then
      [
        "call"
        value.nixboxCall
      ]
    else
      [
        "set"
        (map attribute (real.attrNames value))
      ];
  loaded = load file;
in
describe [ ] 0 (if real.isFunction loaded then apply loaded else loaded)
