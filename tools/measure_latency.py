#!/usr/bin/env python3
"""How a second program fares while another one runs: it sleeps 20 ms, then touches 4 MiB of fresh memory and reads a small file,
again and again. Prints how late it wakes up and how long its work takes: the median, the 99th of 100, and the worst.

    tools/measure_latency.py                          # the machine as it is, 20 seconds
    tools/measure_latency.py --seconds 60 octet run -m mixtral.gguf --ram 12G -p Once -n 40 --ignore-eos
                                                      # while that runs, after --settle (10) seconds, at most so long

Swapped says how much of any program's memory went to swap meanwhile.
"""

import argparse
import mmap
import subprocess
import time

SLEEP = 0.02
BYTES = 4 << 20


def swapped():
    """KiB written to swap since the machine started."""
    with open("/proc/vmstat") as f:
        counts = dict(line.split() for line in f)
    return int(counts.get("pswpout", 0)) * mmap.PAGESIZE // 1024


def work():
    with mmap.mmap(-1, BYTES) as memory:
        for at in range(0, BYTES, mmap.PAGESIZE):
            memory[at] = 1
    with open(__file__, "rb") as f:
        f.read()


def told(times):
    times = sorted(times)
    at = lambda share: 1e3 * times[min(len(times) - 1, int(share * len(times)))]
    return f"median {at(0.5):.2f} ms, 99% {at(0.99):.2f} ms, worst {at(1):.2f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--settle", type=float, default=10)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    other = None
    if args.command:
        other = subprocess.Popen(args.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(args.settle)
    before, late, took = swapped(), [], []
    end = time.monotonic() + args.seconds
    while time.monotonic() < end and (other is None or other.poll() is None):
        due = time.monotonic() + SLEEP
        time.sleep(SLEEP)
        woke = time.monotonic()
        work()
        late.append(woke - due)
        took.append(time.monotonic() - woke)
    if other is not None:
        other.kill()
        other.wait()
    print(f"wakes up late by {told(late)}; its work takes {told(took)}; swapped {swapped() - before} KiB; {len(took)} times")


main()
