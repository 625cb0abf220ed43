#!@sh@
# What bin/NAME of lib.mkSandbox is (sandbox.nix).
set -eu

fail() {
  echo "error: $1" >&2
  [ -z "${2:-}" ] || echo "hint: $2" >&2
  exit 2
}
bb=@busybox@
ours=@ours@

case "${1:-}" in
  -h | --help)
    echo "usage: @name@ [DIRECTORY] [WORDS…]"
    echo
    echo "Make DIRECTORY (this one unless said) a workspace of @name@ and bring its machine up; or run nixbox WORDS…"
    echo "there. Nothing is written but DIRECTORY/.nixbox."
    exit 0
    ;;
  -*) fail "unknown option $1" "@name@ --help" ;;
esac
directory=${1:-.}
[ $# = 0 ] || shift
cd -- "$directory" 2>/dev/null || fail "there is no directory $directory, or it cannot be entered" "make it first"
directory=$(pwd)

# Looked at all before any is written. config.toml comes last: until it is there, this is no workspace.
files=$(cd "$ours" && $bb find . -type f ! -path ./config.toml | $bb sort)
files=$(printf '%s\n./config.toml' "$files")
IFS='
'
for place in $(cd "$ours" && $bb find . -type d); do
  [ ! -L ".nixbox/$place" ] && [ ! -L .nixbox ] ||
    fail "$directory/.nixbox or a directory in it is a link" "remove it, or use another directory"
done
for file in $files; do
  [ ! -e ".nixbox/$file" ] || $bb cmp -s "$ours/$file" ".nixbox/$file" ||
    fail "$directory/.nixbox/${file#./} is another one than @name@'s" "diff $ours/${file#./} .nixbox/${file#./}"
done
for file in $files; do
  [ ! -e ".nixbox/$file" ] || continue
  $bb mkdir -p ".nixbox/$($bb dirname "$file")"
  $bb rm -f ".nixbox/$file.new"
  $bb cp "$ours/$file" ".nixbox/$file.new"
  mode=644
  [ ! -x "$ours/$file" ] || mode=755
  $bb chmod $mode ".nixbox/$file.new"
  $bb mv ".nixbox/$file.new" ".nixbox/$file"
done
unset IFS

@nixbox@ image use @image@
[ $# != 0 ] || set -- up --locked
exec @nixbox@ "$@"
