"""A real S3 server on loopback, and a way to be rude to its clients."""

from __future__ import annotations

import http.client
import logging
import os
import re
import socket
import threading
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from unittest import mock

from moto.server import ThreadedMotoServer

_numbers = count()


class Server:
    """An S3 server behind a gate that counts requests and can answer with errors, or lose answers."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self.origin = f"http://{host}:{port}"
        self.requests: Counter[str] = Counter()
        self.faults: list[str] = []
        """What befalls the next requests: a status ("503"), "drop" (before it is done), "lost" (its answer)."""
        self._gate = ThreadingHTTPServer(("127.0.0.1", 0), _gate(self))
        self._gate.daemon_threads = True
        threading.Thread(target=self._gate.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._gate.server_address[1]}"

    def bucket(self) -> str:
        """The URI of a new bucket."""
        name = f"bucket-{next(_numbers)}"
        urllib.request.urlopen(urllib.request.Request(f"{self.origin}/{name}", method="PUT")).close()
        return f"s3://{name}"

    def environment(self) -> dict[str, str]:
        """What clients must find in theirs."""
        return {
            "AWS_ENDPOINT_URL": self.uri,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    @contextmanager
    def counted(self):
        """A counter of the requests made inside."""
        before = Counter(self.requests)
        inside: Counter[str] = Counter()
        yield inside
        inside.update(self.requests - before)

    def close(self) -> None:
        """End it."""
        self._gate.shutdown()
        self._moto.stop()


def _gate(server: Server) -> type[BaseHTTPRequestHandler]:
    class Gate(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests[self.command] += 1
            fault = server.faults.pop(0) if server.faults else ""
            if fault == "drop":
                self._hang_up()
                return
            if fault.isdigit():
                self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
                return
            moto = http.client.HTTPConnection(server.origin.removeprefix("http://"))
            moto.request(self.command, self.path, body or None, dict(self.headers))
            reply = moto.getresponse()
            status, headers, data = reply.status, dict(reply.headers), reply.read()
            moto.close()
            if fault == "lost":
                self._hang_up()
                return
            self._answer(status, headers, data)

        def _answer(self, status, headers, data):
            self.send_response(status)
            known = {name.lower(): value for name, value in headers.items()}
            length = known.get("content-length", "0") if self.command == "HEAD" else str(len(data))
            for name, value in headers.items():
                if not re.match("content-length|connection|server|date|transfer-encoding", name, re.I):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _hang_up(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    return Gate


@contextmanager
def s3_server():
    """A server whose clients find it in the environment of this process and its children."""
    server = Server()
    with mock.patch.dict(os.environ, server.environment()):
        yield server
    server.close()
