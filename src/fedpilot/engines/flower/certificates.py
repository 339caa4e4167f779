"""Keys and certificates of a federation: an authority of its own, the server's certificate, a key for each node."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpilot.errors import ConfigError

CA, SERVER, SERVER_KEY, NODES, REVOKED = "ca.crt", "server.crt", "server.key", "nodes", "revoked"


def make(folder: Path, hosts: Sequence[str], nodes: Sequence[str], days: int = 365) -> list[Path]:
    """Writes what is not there yet; files that are there stay as they are.

    The authority's key signs the server's certificate and is then forgotten: a new server certificate means a new
    authority, and nobody can sign another one meanwhile.

    Args:
        folder: ``ca.crt`` goes to everybody, ``server.crt`` and ``server.key`` stay on the server, ``nodes/NAME`` goes
            to that node alone and ``nodes/NAME.pub`` stays on the server.
        hosts: Names and addresses that nodes reach the server by; this machine's own are always among them.
        nodes: Names of clients.
        days: How long the server's certificate is good.

    Returns:
        What was written.

    Raises:
        ConfigError: A part of the server's files is there and a part is not, or a name cannot be a file's.
    """
    wrong = [name for name in nodes if not name or "/" in name or name.startswith(".") or not name.isprintable()]
    if wrong:
        raise ConfigError([f"names of nodes must be usable as names of files, got {', '.join(map(repr, wrong))}"])
    server = [folder / name for name in (CA, SERVER, SERVER_KEY)]
    there = [path.name for path in server if path.exists()]
    if there and len(there) < len(server):
        raise ConfigError([f"{folder} must hold all of {CA}, {SERVER} and {SERVER_KEY} or none, got {there}"])
    (folder / NODES).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    written: list[Path] = []
    if not there:
        written += _make_server(folder, hosts, days)
    for name in nodes:
        if not (folder / NODES / name).exists():
            written += _make_node(folder / NODES / name)
    return written


def revoke(folder: Path, names: Sequence[str]) -> list[Path]:
    """Takes nodes' keys out of those that may join; a server that runs lets them in no more within a second.

    Args:
        folder: That `make` wrote.
        names: Of the nodes.

    Returns:
        Where their public keys are kept, for the record.

    Raises:
        ConfigError: One has no key there; nothing is revoked then.
    """
    known = public_keys(folder)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            [f"{name!r} must be a node with a key in {folder / NODES}, known: {', '.join(known)}" for name in unknown]
        )
    aside = []
    for name in names:
        (folder / REVOKED).mkdir(exist_ok=True)
        number = len(list((folder / REVOKED).glob(f"{name}.*.pub")))
        kept = folder / REVOKED / f"{name}.{number}.pub"
        os.replace(known[name], kept)
        (folder / NODES / name).unlink(missing_ok=True)  # of no more use, and nobody should find it
        aside.append(kept)
    return aside


def public_keys(folder: Path) -> dict[str, Path]:
    """Name -> public key of each node that may join."""
    return {path.stem: path for path in sorted((folder / NODES).glob("*.pub"))}


def check_dates(folder: Path) -> None:
    """Refuses certificates that no node would believe by the clock of this machine.

    Raises:
        ConfigError: One has ended or has not begun, or is no certificate.
    """
    now, problems = datetime.datetime.now(datetime.UTC), []
    for file in (folder / CA, folder / SERVER):
        try:
            found = x509.load_pem_x509_certificate(file.read_bytes())
        except (OSError, ValueError) as error:
            problems.append(f"{file} must be a certificate: {error}; make new ones with fedpilot certs")
            continue
        since, until = found.not_valid_before_utc, found.not_valid_after_utc
        if not since <= now <= until:
            problems.append(
                f"{file} must be good at {now:%Y-%m-%d %H:%M} UTC, got {since:%Y-%m-%d} to {until:%Y-%m-%d}; "
                "make new certificates with fedpilot certs in another folder and give ca.crt to the nodes, or set the "
                "clock"
            )
    if problems:
        raise ConfigError(problems)


def _make_server(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer, subject = _name("fedpilot authority"), _name("fedpilot server")
    names = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
    ca = (
        _signed_by(issuer, issuer, ca_key, now, until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    server = (
        _signed_by(subject, issuer, key, now, until)
        .add_extension(x509.SubjectAlternativeName([_general(host) for host in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return [
        _write(folder / CA, ca.public_bytes(serialization.Encoding.PEM), 0o644),
        _write(folder / SERVER, server.public_bytes(serialization.Encoding.PEM), 0o644),
        _write(folder / SERVER_KEY, private, 0o600),
    ]


def _make_node(path: Path) -> list[Path]:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [_write(path, private, 0o600), _write(path.with_name(f"{path.name}.pub"), public + b"\n", 0o644)]


def _signed_by(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(until)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> Path:
    """A new file that is never readable by others for a moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return path
