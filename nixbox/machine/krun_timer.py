"""One call of libkrun's to KVM that is answered without asking KVM: it would keep a start waiting for 16 ms.

libkrun gives a machine KVM's old timer chip (the PIT) and then says that its lost ticks are not to be made up for:
KVM_REINJECT_CONTROL. In there KVM waits twice for whoever uses its table of interrupts (synchronize_srcu), and the
second time in full, as the first has just ended (exp_holdoff in kernel/rcu/srcutree.c). Our guests never use that
chip: they have the APIC's timer and KVM's clock. See docs/decisions/039-a-call-that-kvm-is-not-asked.md.
"""

from __future__ import annotations

from nixbox import linux

REINJECT_CONTROL = 0xAE71  # linux/kvm.h: _IO(KVMIO, 0x71)
_IOCTL = 16  # asm/unistd_64.h


def skip(request: int, machine: str) -> None:
    """Have this thread, and those that it begins, succeed at ioctl(2) with this request, without its being done.

    On x86_64 (`machine` as in uname(2)): no other has such a chip. Raises OSError.
    """
    if machine != "x86_64":
        return
    load, equal, end = linux.BPF_LOAD, linux.BPF_EQUAL, linux.BPF_END
    program = linux.bpf(
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, 5, linux.AUDIT_ARCH[machine]),
        (load, 0, 0, 0),  # seccomp_data.nr
        (equal, 0, 3, _IOCTL),
        (load, 0, 0, 16 + 8),  # the lower half of seccomp_data.args[1]
        (equal, 0, 1, request),
        (end, 0, 0, linux.SECCOMP_ERROR),  # with the number 0: none
        (end, 0, 0, linux.SECCOMP_ALLOW),
    )
    linux.seccomp(program)
