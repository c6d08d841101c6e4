"""What Ray starts as its Python in a run of main.py: has a worker forked, and lives as long as it.

A program of its own that imports next to nothing. Arguments: the socket of main.py, then Ray's worker and its own.
"""

import json
import os
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(server, [b" "], [0, 1, 2])
    server.sendall(json.dumps(request).encode())
    server.shutdown(socket.SHUT_WR)
    server.recv(1)  # nothing comes but the end
