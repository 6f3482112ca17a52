"""Lets the packets that a network device hands on be so many bytes long before anything cuts them up, over IPv4. `ip link` has
a word for this from iproute2 6.2 on; before, the kernel is asked by the message that `ip` would send it.

Usage: large_packets.py DEVICE BYTES
"""

import os
import socket
import struct
import sys

# linux/rtnetlink.h, linux/if_link.h
NEW_LINK, REQUEST_WITH_ANSWER = 16, 0x1 | 0x4
GSO_IPV4_MAX_SIZE, GRO_IPV4_MAX_SIZE = 63, 64

device, size = sys.argv[1], int(sys.argv[2])
sizes = b"".join(struct.pack("=HHI", 8, which, size) for which in (GSO_IPV4_MAX_SIZE, GRO_IPV4_MAX_SIZE))
link = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(device), 0, 0) + sizes
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
    kernel.bind((0, 0))
    kernel.send(struct.pack("=IHHII", 16 + len(link), NEW_LINK, REQUEST_WITH_ANSWER, 1, 0) + link)
    answer = kernel.recv(4096)
if code := struct.unpack_from("=i", answer, 16)[0]:
    sys.exit(f"{device}: packets of {size} bytes: {os.strerror(-code)}")
