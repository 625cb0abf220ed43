{ domains = [ "github.com" "pypi.org" ]; }
