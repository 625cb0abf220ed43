# Of the arguments of mkImage and mkSandbox those that say what the configuration is: what config.nix takes.
given: removeAttrs given [ "name" "nixbox" "runBusybox" "busybox" "mirrors" "build" "buildNetwork" "options" ]
