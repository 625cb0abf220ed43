# A TOML document of an attribute set: what homeModules and mkSandbox write.
#
#   value   text, whole numbers, true and false, lists of these and of tables, tables; null is left out
#
# One top-level key a line, what is below it as inline tables, which every reader of TOML knows.
value:
let
  isBare = key: builtins.match "[A-Za-z0-9_-]+" key != null;
  # JSON's escapes are TOML's, but for the delete character, which TOML wants escaped as well.
  text = s: builtins.replaceStrings [ delete ] [ "\\u007F" ] (builtins.toJSON s);
  delete = builtins.fromJSON ''"\u007f"'';
  key = k: if isBare k then k else text k;
  said = set: builtins.filter (k: set.${k} != null) (builtins.attrNames set);
  entry = path: set: k: "${key k} = ${item "${path}${k}" set.${k}}";
  item = path: v: {
    string = text v;
    int = toString v;
    bool = if v then "true" else "false";
    list = "[${builtins.concatStringsSep ", " (map (item path) v)}]";
    set = "{ ${builtins.concatStringsSep ", " (map (entry "${path}." v) (said v))} }";
  }.${builtins.typeOf v} or (throw "nixbox: ${path}: TOML has no ${builtins.typeOf v}; write it as text");
in
builtins.concatStringsSep "" (map (k: entry "" value k + "\n") (said value))
