"""Stands for a process that `tests.fork_server` forks: gets its signals, and ends as it does.

python -I -S fork_client.py ADDRESS ARGUMENTS-OF-PYTHON...
"""

import json
import os
import signal
import socket
import sys

address, *arguments = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as server:
    server.connect(address)
    asked = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    told = json.dumps(asked).encode()
    socket.send_fds(server, [len(told).to_bytes(4)], [0, 1, 2])
    server.sendall(told)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: server.sendall(bytes([number])))
    for stream in (0, 1):
        os.close(stream)
    status = server.recv(4) or sys.exit("the server of forks has ended")
ended = os.waitstatus_to_exitcode(int.from_bytes(status))
if ended < 0:
    if -ended in (signal.SIGINT, signal.SIGTERM):
        signal.signal(-ended, signal.SIG_DFL)
    os.kill(os.getpid(), -ended)
os._exit(ended)
