"""Keys and certificates: right for TLS, private ones for their owner alone."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedpilot.engines.flower import certificates
from fedpilot.engines.flower.deployment import Serving, serve
from fedpilot.errors import ConfigError
from tests.engines.flower.test_reach import DAY, NOW, signed


def test_the_servers_certificate_is_its_authoritys_and_names_its_hosts(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["fl.example.org", "10.0.0.7"], [])
    ca, server = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"fl.example.org", "localhost"}
    assert {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1", "::1"}


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fl.example.org"])
def test_a_tls_handshake_succeeds_for_a_named_host_and_fails_for_others_and_another_authority(
    host: str, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "ours", ["fl.example.org"], [])
    certificates.make(tmp_path / "theirs", [], [])
    handshake(tmp_path / "ours", tmp_path / "ours", host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", tmp_path / "ours", "elsewhere.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", tmp_path / "theirs", host)


def handshake(server: Path, client: Path, host: str) -> None:
    """TLS between two ends in memory."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(server / "server.crt", server / "server.key")
    here = ssl.create_default_context(cafile=str(client / "ca.crt"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [here.wrap_bio(down, up, server_hostname=host), there.wrap_bio(up, down, server_side=True)]
    done = [False, False]
    for _ in range(8):
        for index, end in enumerate(ends):
            try:
                end.do_handshake()
                done[index] = True
            except ssl.SSLWantReadError:
                continue
    assert done == [True, True]


def test_a_nodes_key_is_of_the_curve_that_flower_takes_and_fits_its_public_half(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], ["Bern"])
    key = load_ssh_private_key((tmp_path / "nodes" / "Bern").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "nodes" / "Bern.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp384r1"
    assert key.public_key() == public


def test_only_the_owner_can_read_what_is_private(tmp_path: Path) -> None:
    certificates.make(tmp_path / "certs", [], ["Bern"])
    for name in ("server.key", "nodes/Bern"):
        assert stat.S_IMODE((tmp_path / "certs" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "certs").stat().st_mode) == 0o700
    assert not list((tmp_path / "certs").glob("ca.key"))


def test_what_is_there_stays_and_new_nodes_are_added(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], ["Bern"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = certificates.make(tmp_path, [], ["Bern", "Oslo"])
    assert [path.name for path in written] == ["Oslo", "Oslo.pub"]
    assert {path: path.read_bytes() for path in before} == before
    assert list(certificates.public_keys(tmp_path)) == ["Bern", "Oslo"]


def test_half_a_set_of_server_files_is_an_error(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], [])
    (tmp_path / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"must hold all of ca\.crt, server\.crt and server\.key or none"):
        certificates.make(tmp_path, [], [])


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a\nb"])
def test_a_name_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of nodes must be usable"):
        certificates.make(tmp_path, [], [name])


def test_a_revoked_node_is_not_among_those_that_may_join_and_its_key_is_gone(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], ["Bern", "Oslo"])
    public = (tmp_path / "nodes" / "Oslo.pub").read_bytes()
    (kept,) = certificates.revoke(tmp_path, ["Oslo"])
    assert list(certificates.public_keys(tmp_path)) == ["Bern"]
    assert kept.read_bytes() == public
    assert not (tmp_path / "nodes" / "Oslo").exists()
    certificates.make(tmp_path, [], ["Oslo"])  # a new key under the old name
    assert (tmp_path / "nodes" / "Oslo.pub").read_bytes() != public
    assert certificates.revoke(tmp_path, ["Oslo"]) == [tmp_path / "revoked" / "Oslo.1.pub"]


def test_a_node_without_a_key_cannot_be_revoked_and_nobody_else_is(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], ["Bern"])
    with pytest.raises(ConfigError, match=r"'Olso' must be a node with a key in .*, known: Bern"):
        certificates.revoke(tmp_path, ["Bern", "Olso"])
    assert list(certificates.public_keys(tmp_path)) == ["Bern"]


def test_a_server_does_not_start_with_a_certificate_that_has_ended(tmp_path: Path) -> None:
    certs = signed(tmp_path / "certs", NOW - 3 * DAY, NOW - DAY)
    certificates.make(certs, [], ["Bern"])
    serving = Serving(tmp_path / "run", None, certs, "127.0.0.1", 1)
    with pytest.raises(ConfigError, match=r"server\.crt must be good at .* UTC, got .*; make new certificates"):
        serve(serving, print)
    assert not (tmp_path / "run").exists()


def test_good_certificates_have_good_dates_and_another_file_is_none(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], [])
    certificates.check_dates(tmp_path)
    (tmp_path / "server.crt").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"server\.crt must be a certificate"):
        certificates.check_dates(tmp_path)
