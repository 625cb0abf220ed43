"""Tests on a KVM host that QEMU emulates: a real /dev/kvm where this host has none that runs guests."""
