"""Why a node cannot reach a server: name, port, certificate, version, clock and key, in the order of a connection.

Flower says of all of these "connection attempt failed, retrying". What is asked changes nothing on the server: a signed
request to be activated with a heartbeat that is refused, which is looked at only after clock, signature and key.
"""

import datetime
import email.utils
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpilot.doctor import Finding, package_version
from fedpilot.engines.flower import compat

Clock = Callable[[], datetime.datetime]
PATIENCE_S = 10.0

# OpenSSL's numbers of what it finds wrong with a certificate.
NOT_YET, EXPIRED, WRONG_NAME, WRONG_ADDRESS = 9, 10, 62, 64


def utc_now() -> datetime.datetime:
    """The clock of this machine."""
    return datetime.datetime.now(datetime.UTC)


def examine(host: str, port: int, ca: Path, key: Path, clock: Clock = utc_now) -> Iterator[Finding]:
    """What stands between a node and its server; ends with the first thing that does.

    Args:
        host: Of the server.
        port: Of it.
        ca: The authority's certificate.
        key: The node's private key.
        clock: Of this machine.
    """
    for look in (_authority, _key, _port, _certificate, _server):
        finding = look(_Asked(host, port, ca, key, clock))
        yield from finding
        if any(one.state == "problem" for one in finding):
            return


@dataclass(frozen=True)
class _Asked:
    """The arguments of `examine`."""

    host: str
    port: int
    ca: Path
    key: Path
    clock: Clock


def _authority(asked: _Asked) -> list[Finding]:
    try:
        found = x509.load_pem_x509_certificate(asked.ca.read_bytes())
    except (OSError, ValueError) as error:
        advice = "copy ca.crt from the server's certificates"
        return [Finding("authority", "problem", f"{asked.ca} is no certificate: {error}", advice)]
    until = found.not_valid_after_utc
    if asked.clock() > until:
        said = f"{asked.ca} ended on {until:%Y-%m-%d}, and the clock here says {asked.clock():%Y-%m-%d %H:%M} UTC"
        return [Finding("authority", "problem", said, "make new certificates with fedpilot certs, or set the clock")]
    return [Finding("authority", "ok", f"{asked.ca}, good until {until:%Y-%m-%d}")]


def _key(asked: _Asked) -> list[Finding]:
    advice = "copy it from the server's certs/nodes; chmod 600 it"
    try:
        key = load_ssh_private_key(asked.key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        return [Finding("key", "problem", f"{asked.key} is no private key: {str(error)[:200]}", advice)]
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return [Finding("key", "problem", f"{asked.key} is of another kind than fedpilot certs makes", advice)]
    if asked.key.stat().st_mode & 0o077:
        return [Finding("key", "warning", f"{asked.key} can be read by others", f"chmod 600 {asked.key}")]
    return [Finding("key", "ok", f"{asked.key}")]


def _port(asked: _Asked) -> list[Finding]:
    where = f"{asked.host}:{asked.port}"
    try:
        socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [
            Finding("name", "problem", f"{asked.host} has no address here: {error}", "mend the name, or /etc/hosts")
        ]
    try:
        socket.create_connection((asked.host, asked.port), PATIENCE_S).close()
    except ConnectionRefusedError:
        advice = "start fedpilot serve there, and look at its --address: 127.0.0.1 is reached from the server only"
        return [Finding("port", "problem", f"{where} is closed: nobody listens", advice)]
    except OSError as error:
        advice = "look for a firewall between here and there, and at the address"
        return [Finding("port", "problem", f"{where} cannot be reached: {error}", advice)]
    return [Finding("port", "ok", f"{where} is open")]


def _certificate(asked: _Asked) -> list[Finding]:
    context = ssl.create_default_context(cafile=str(asked.ca))
    try:
        with (
            socket.create_connection((asked.host, asked.port), PATIENCE_S) as raw,
            context.wrap_socket(raw, server_hostname=asked.host) as secure,
        ):
            return [Finding("certificate", "ok", f"signed by this authority for {asked.host}, {secure.version()}")]
    except ssl.SSLCertVerificationError as error:
        return [_distrusted(asked, error)]
    except ssl.SSLError as error:
        said = f"{asked.host}:{asked.port} speaks no TLS: {error.reason or error}"
        return [Finding("certificate", "problem", said, "it is plain HTTP or another service; look at the port")]
    except OSError as error:
        said = f"{asked.host}:{asked.port} ended the connection: {error}"
        return [Finding("certificate", "problem", said, "it is another service, or a proxy; look at the port")]


def _distrusted(asked: _Asked, error: ssl.SSLCertVerificationError) -> Finding:
    """Why the server's certificate is not believed."""
    try:
        shown = x509.load_pem_x509_certificate(_shown(asked).encode())
        names = ", ".join(_names(shown))
        since, until = shown.not_valid_before_utc, shown.not_valid_after_utc
    except (OSError, ValueError):
        return Finding("certificate", "problem", f"the server's certificate is refused: {error.verify_message}", "")
    here = f"the clock here says {asked.clock():%Y-%m-%d %H:%M} UTC"
    if error.verify_code == EXPIRED:
        said = f"the server's certificate ended on {until:%Y-%m-%d %H:%M}, and {here}"
        return Finding("certificate", "problem", said, "make new ones with fedpilot certs, or set the clock")
    if error.verify_code == NOT_YET:
        said = f"the server's certificate begins on {since:%Y-%m-%d %H:%M}, and {here}"
        return Finding("clock", "problem", said, "set the clock here")
    if error.verify_code in (WRONG_NAME, WRONG_ADDRESS):
        said = f"the server's certificate is for {names}, not for {asked.host}"
        return Finding("certificate", "problem", said, f"join by one of these, or fedpilot certs --host {asked.host}")
    said = f"the server's certificate is not signed by {asked.ca}: {error.verify_message}"
    return Finding("certificate", "problem", said, "copy ca.crt from the server that you join; it has another")


def _shown(asked: _Asked) -> str:
    """The server's certificate, believed or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent over this connection
    with (
        socket.create_connection((asked.host, asked.port), PATIENCE_S) as raw,
        context.wrap_socket(raw, server_hostname=asked.host) as secure,
    ):
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["nobody"]
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _server(asked: _Asked) -> list[Finding]:
    """Version, clock and key, by the answer to a signed question."""
    key = load_ssh_private_key(asked.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), "looked at before"
    now = asked.clock()
    path, headers, content = compat.idle_question(key, now)
    context = ssl.create_default_context(cafile=str(asked.ca))
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    try:
        with httpx.Client(verify=context, timeout=PATIENCE_S, trust_env=False) as client:
            answer = client.post(f"https://{host}:{asked.port}{path}", headers=headers, content=content)
    except httpx.HTTPError as error:
        said = f"the server does not answer: {error or type(error).__name__}"
        return [Finding("server", "problem", said, "look at superlink.log there")]
    theirs = answer.headers.get(compat.VERSIONS)
    if theirs is None:
        return [Finding("server", "problem", f"what answers is no fedpilot serve, HTTP {answer.status_code}", "")]
    return [*_versions(theirs), *_clock(now, answer), *_known(asked, answer)]


def _versions(theirs: str) -> list[Finding]:
    ours = compat.versions()
    if theirs != ours:
        return [Finding("version", "problem", f"the server has {theirs}, this machine {ours}", "install the same")]
    return [Finding("version", "ok", f"{ours}, as the server; torch {package_version('torch')} here")]


def _clock(now: datetime.datetime, answer: httpx.Response) -> list[Finding]:
    told = answer.headers.get("date")
    if told is None:
        return []
    ahead = (now - email.utils.parsedate_to_datetime(told)).total_seconds()
    behind_most, ahead_most = compat.clock_tolerance()
    difference = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if not -behind_most < ahead < ahead_most + 1:  # it is told in whole seconds
        allowed = f"{behind_most:.0f} s behind or {ahead_most:.0f} s ahead"
        said = f"the clock here is {difference}; it may be {allowed}"
        return [Finding("clock", "problem", said, "set the clock on both machines, by NTP")]
    return [Finding("clock", "ok", f"{difference}")]


def _known(asked: _Asked, answer: httpx.Response) -> list[Finding]:
    found = compat.knows(answer)
    if found is None:
        said = f"the server refused the signature, HTTP {answer.status_code}"
        return [Finding("registered", "problem", said, "set the clock; see superlink.log on the server")]
    if not found:
        advice = f"on the server: fedpilot certs DIR --node {asked.key.name}, take its key, and start serve again"
        return [Finding("registered", "problem", f"the server does not know {asked.key}, or no more", advice)]
    return [Finding("registered", "ok", f"the server knows the key {asked.key}")]
