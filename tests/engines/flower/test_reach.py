"""Each cause that keeps a node from its server, named over real sockets and real TLS."""

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpilot.doctor import Finding
from fedpilot.engines.flower import certificates, compat, reach
from fedpilot.engines.flower.deployment import free_port

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    certificates.make(folder, [], ["Oslo"])
    return folder


def signed(folder: Path, since: datetime.datetime, until: datetime.datetime, address: str = "127.0.0.1") -> Path:
    """An authority that is good now, and a server's certificate that is good from one time to another."""

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())

    def begun(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("ca")).public_key(public)
        return builder.serial_number(x509.random_serial_number())

    ca = begun("ca", ca_key.public_key()).not_valid_before(NOW - 9 * DAY).not_valid_after(NOW + 9 * DAY)
    ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    ca = ca.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
    server = begun("server", key.public_key()).not_valid_before(since).not_valid_after(until)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    server = server.add_extension(names, critical=False).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
    )
    folder.mkdir(exist_ok=True)
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(ca.sign(ca_key, hashes.SHA384()).public_bytes(pem))
    (folder / "server.crt").write_bytes(server.sign(ca_key, hashes.SHA384()).public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(private)
    return folder


class Other(BaseHTTPRequestHandler):
    """A web server that is not fedpilot's."""

    def do_POST(self) -> None:  # its name is http.server's
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def listening(folder: Path | None, handler: type[BaseHTTPRequestHandler] = Other) -> Iterator[int]:
    """A server with the folder's certificate, or without TLS; its port."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that does not trust it goes away."""

        def finish_request(self, request: socket.socket, address: object) -> None:  # type: ignore[override]
            if folder is None:
                super().finish_request(request, address)  # type: ignore[arg-type]
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.crt", folder / "server.key")
            with suppress(OSError), context.wrap_socket(request, server_side=True) as secure:  # in its own thread
                super().finish_request(secure, address)  # type: ignore[arg-type]

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def examined(ca: Path, key: Path, port: int, host: str = "127.0.0.1", **options: Callable[[], object]) -> list[Finding]:
    return list(reach.examine(host, port, ca, key, **options))  # type: ignore[arg-type]


def problem(ca: Path, key: Path, port: int, host: str = "127.0.0.1", **options: Callable[[], object]) -> str:
    """The one problem, which is the last thing that was looked at."""
    found = examined(ca, key, port, host, **options)
    assert [one.state for one in found[:-1]] == ["ok"] * (len(found) - 1), found
    assert found[-1].state == "problem", found
    assert found[-1].advice
    return f"{found[-1].what}: {found[-1].said}"


def test_a_closed_port_is_said_with_what_to_start(keys: Path) -> None:
    port = free_port()
    said = problem(keys / "ca.crt", keys / "nodes" / "Oslo", port)
    assert said == f"port: 127.0.0.1:{port} is closed: nobody listens"


def test_a_name_without_an_address_is_said(keys: Path) -> None:
    said = problem(keys / "ca.crt", keys / "nodes" / "Oslo", 9, host="no-such-host.invalid")
    assert said.startswith("name: no-such-host.invalid has no address here")


def test_plain_http_is_said_to_be_no_tls(keys: Path) -> None:
    with listening(None) as port:
        assert f"127.0.0.1:{port} speaks no TLS" in problem(keys / "ca.crt", keys / "nodes" / "Oslo", port)


def test_a_server_of_another_authority_is_said(keys: Path, tmp_path: Path) -> None:
    certificates.make(tmp_path / "other", [], [])
    with listening(tmp_path / "other") as port:
        said = problem(keys / "ca.crt", keys / "nodes" / "Oslo", port)
    assert said.startswith(f"certificate: the server's certificate is not signed by {keys / 'ca.crt'}")


def test_an_expired_certificate_is_said_with_both_clocks(keys: Path, tmp_path: Path) -> None:
    with listening(signed(tmp_path, NOW - 3 * DAY, NOW - DAY)) as port:
        said = problem(tmp_path / "ca.crt", keys / "nodes" / "Oslo", port)
    assert f"the server's certificate ended on {NOW - DAY:%Y-%m-%d}" in said
    assert "and the clock here says 20" in said


def test_a_certificate_of_the_future_is_a_clock_that_is_behind(keys: Path, tmp_path: Path) -> None:
    with listening(signed(tmp_path, NOW + DAY, NOW + 3 * DAY)) as port:
        said = problem(tmp_path / "ca.crt", keys / "nodes" / "Oslo", port)
    assert said.startswith(f"clock: the server's certificate begins on {NOW + DAY:%Y-%m-%d}")


def test_a_certificate_for_another_address_is_said_with_its_names(keys: Path, tmp_path: Path) -> None:
    with listening(signed(tmp_path, NOW - DAY, NOW + DAY, "192.0.2.7")) as port:
        said = problem(tmp_path / "ca.crt", keys / "nodes" / "Oslo", port)
    assert said == "certificate: the server's certificate is for 192.0.2.7, not for 127.0.0.1"


def test_an_expired_authority_is_said_before_anything_is_sent(keys: Path) -> None:
    late = lambda: NOW + 400 * DAY  # noqa: E731
    assert "ca.crt ended on" in problem(keys / "ca.crt", keys / "nodes" / "Oslo", 9, clock=late)


def test_what_is_no_certificate_and_what_is_no_key_is_said(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    (tmp_path / "nonsense").chmod(0o600)
    assert "is no certificate" in problem(tmp_path / "nonsense", keys / "nodes" / "Oslo", 9)
    assert "is no certificate" in problem(tmp_path / "absent", keys / "nodes" / "Oslo", 9)
    assert "is no private key" in problem(keys / "ca.crt", tmp_path / "nonsense", 9)
    assert "is no private key" in problem(keys / "ca.crt", keys / "nodes" / "Oslo.pub", 9)


def test_a_key_that_others_can_read_is_a_warning(keys: Path, tmp_path: Path) -> None:
    key = tmp_path / "Oslo"
    key.write_bytes((keys / "nodes" / "Oslo").read_bytes())
    key.chmod(0o644)
    found = examined(keys / "ca.crt", key, free_port())
    assert [(one.what, one.state) for one in found] == [("authority", "ok"), ("key", "warning"), ("port", "problem")]


def test_a_service_that_is_not_fedpilots_is_said(keys: Path) -> None:
    with listening(keys) as port:
        found = examined(keys / "ca.crt", keys / "nodes" / "Oslo", port)
    assert found[-1].state == "problem"
    assert found[-1].said == "what answers is no fedpilot serve, HTTP 404"


def test_another_version_is_said_with_both(keys: Path) -> None:
    class Older(Other):
        def end_headers(self) -> None:
            self.send_header(compat.VERSIONS, "fedpilot 0.0.1, flwr 1.0.0")
            super().end_headers()

    with listening(keys, Older) as port:
        found = examined(keys / "ca.crt", keys / "nodes" / "Oslo", port)
    (version,) = [one for one in found if one.what == "version"]
    assert version.state == "problem"
    assert version.said == f"the server has fedpilot 0.0.1, flwr 1.0.0, this machine {compat.versions()}"
