"""A phone as the adb server sees one over TCP: it speaks the wire protocol of adbd, runs shell commands for real in a
folder that stands for its file system, and takes and gives files by the sync protocol.

Protocol: packages/modules/adb/protocol.txt and SYNC.TXT of Android."""

from __future__ import annotations

import os
import queue
import re
import socket
import stat
import struct
import subprocess
import threading
from pathlib import Path

VERSION, MAX_DATA = 0x01000000, 256 * 1024
ROOTS = {"/data/local/tmp": "files", "/sdcard": "sdcard"}
PROPS = {
    "ro.product.manufacturer": "Acme", "ro.product.model": "Phone 1", "ro.build.version.release": "15",
    "ro.soc.model": "SM8650", "ro.product.cpu.abilist": "arm64-v8a,x86_64",
}  # fmt: skip


def message(command: bytes, a: int, b: int, data: bytes = b"") -> bytes:
    number = int.from_bytes(command, "little")
    return struct.pack("<6I", number, a, b, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF) + data


class Phone:
    """``cut_at``: the connection breaks when a shell command matches. ``spoil``: pushed files lose their last byte.
    ``emulator``: a command that runs programs of the phone's processor."""

    def __init__(self, folder: Path):
        self.folder, self.props = folder, dict(PROPS)
        self.thermal, self.cut_at, self.spoil, self.emulator = 0, "", False, ""
        self.commands: list[str] = []
        self.pushed: list[str] = []
        for name in (*ROOTS.values(), "bin"):
            (folder / name).mkdir()
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def local(self, path: str) -> Path:
        (root,) = [root for root in ROOTS if path.startswith(root)]
        return self.folder / ROOTS[root] / path.removeprefix(root).lstrip("/")

    def install(self, name: str, script: str) -> None:
        """A program on the phone's PATH."""
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}")
        (self.folder / "bin" / name).chmod(0o755)

    def close(self) -> None:
        self.listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=_Connection(self, connection).serve, daemon=True).start()

    def shell(self, command: str) -> bytes:
        self.commands.append(command)
        if command.startswith("getprop"):
            listed = "".join(f"[{name}]: [{value}]\n" for name, value in self.props.items())
            return self._with_exit_code(command, listed)
        if command.startswith("dumpsys thermalservice"):
            return self._with_exit_code(command, f"IsStatusOverride: false\nThermal Status: {self.thermal}\n")
        if command.startswith("dumpsys battery"):
            return self._with_exit_code(command, "  AC powered: false\n  USB powered: true\n  level: 81\n")
        there = command
        for root, name in ROOTS.items():
            there = there.replace(root, str(self.folder / name))
        there = re.sub(r"\S+(?= --model_path)", lambda program: f"{self.emulator} {program[0]}", there)
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", there], env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.stdout

    @staticmethod
    def _with_exit_code(command: str, text: str) -> bytes:
        """What a shell prints for ``X; echo MARK$?`` when X prints ``text``."""
        mark = re.search(r"; echo ([^$]+)\$\?", command)
        return (text + (f"{mark[1]}0\n" if mark else "")).encode()


class _Connection:
    def __init__(self, phone: Phone, connection: socket.socket):
        self.phone, self.socket = phone, connection
        self.lock = threading.Lock()
        self.inboxes: dict[int, queue.Queue[bytes | None]] = {}
        self.credits: dict[int, threading.Semaphore] = {}

    def send(self, *parts: object) -> None:
        with self.lock:
            self.socket.sendall(message(*parts))  # type: ignore[arg-type]

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionError
            data += piece
        return data

    def serve(self) -> None:
        try:
            while True:
                number, a, b, size, _, _ = struct.unpack("<6I", self.receive(24))
                self.handle(number.to_bytes(4, "little"), a, b, self.receive(size))
        except (ConnectionError, OSError):
            for inbox in self.inboxes.values():
                inbox.put(None)

    def handle(self, command: bytes, a: int, b: int, data: bytes) -> None:
        if command == b"CNXN":
            banner = f"device::ro.product.name=phone;ro.product.model={self.phone.props['ro.product.model']};"
            self.send(b"CNXN", VERSION, MAX_DATA, banner.encode())
        elif command == b"OPEN":
            self.inboxes[a], self.credits[a] = queue.Queue(), threading.Semaphore(0)
            self.send(b"OKAY", a, a)
            threading.Thread(target=self.service, args=(a, data.rstrip(b"\0").decode()), daemon=True).start()
        elif command == b"WRTE":
            self.inboxes[a].put(data)
            self.send(b"OKAY", a, a)
        elif command == b"OKAY":
            self.credits[a].release()
        elif command == b"CLSE" and a in self.inboxes:
            self.inboxes[a].put(None)

    def write(self, stream: int, data: bytes) -> None:
        for i in range(0, len(data), MAX_DATA):
            self.send(b"WRTE", stream, stream, data[i : i + MAX_DATA])
            self.credits[stream].acquire(timeout=10)

    def service(self, stream: int, name: str) -> None:
        kind, _, command = name.partition(":")
        try:
            if kind == "shell":
                if self.phone.cut_at and re.search(self.phone.cut_at, command):
                    self.socket.shutdown(socket.SHUT_RDWR)
                    return
                self.write(stream, self.phone.shell(command))
            elif kind == "sync":
                _Sync(self, stream).serve()
            self.send(b"CLSE", stream, stream)
        except OSError:
            return


class _Sync:
    """One sync session: STAT, SEND and RECV."""

    def __init__(self, connection: _Connection, stream: int):
        self.connection, self.stream, self.buffer = connection, stream, b""

    def read(self, count: int) -> bytes:
        while len(self.buffer) < count:
            piece = self.connection.inboxes[self.stream].get(timeout=60)
            if piece is None:
                raise ConnectionError
            self.buffer += piece
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def serve(self) -> None:
        while True:
            try:
                name, size = self.read(4), int.from_bytes(self.read(4), "little")
            except ConnectionError:
                return
            if name == b"QUIT":
                return
            path = self.read(size).decode()
            {b"STAT": self.stat, b"SEND": self.receive, b"RECV": self.give}[name](path)

    def stat(self, path: str) -> None:
        file = self.connection.phone.local(path)
        found = file.stat() if file.exists() else None
        facts = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
        self.connection.write(self.stream, b"STAT" + struct.pack("<III", *facts))

    def receive(self, path: str) -> None:
        path, _, mode = path.rpartition(",")
        data = bytearray()
        while (name := self.read(4)) == b"DATA":
            data += self.read(int.from_bytes(self.read(4), "little"))
        assert name == b"DONE", name
        self.read(4)
        phone = self.connection.phone
        phone.pushed.append(path)
        file = phone.local(path)
        file.write_bytes(data[:-1] if phone.spoil else data)
        file.chmod(stat.S_IMODE(int(mode)))
        self.connection.write(self.stream, b"OKAY" + bytes(4))

    def give(self, path: str) -> None:
        file = self.connection.phone.local(path)
        if not file.is_file():
            text = b"No such file"
            self.connection.write(self.stream, b"FAIL" + struct.pack("<I", len(text)) + text)
            return
        data = file.read_bytes()
        parts = [data[i : i + 65536] for i in range(0, len(data), 65536)]
        framed = b"".join(b"DATA" + struct.pack("<I", len(part)) + part for part in parts)
        self.connection.write(self.stream, framed + b"DONE" + bytes(4))
