# Shell text that lays out, in the directory `dir`, the tree that every guest starts from: static busybox, the guest's
# own scripts (nix/guest) and the mount points that they use. Needs $busybox and $guest; `dir`/modules is left empty.
dir: ''
  mkdir -p ${dir}
  (
    cd ${dir}
    mkdir bin dev proc sys run modules lower overlay new nixbox
    cp $busybox/bin/busybox bin/
    ln -s busybox bin/sh
    cp $guest/* nixbox/
    mv nixbox/stage1 init
    chmod 755 init nixbox/*
  )
''
