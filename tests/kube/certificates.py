"""Keys and certificates of a test cluster: one authority, a few holders."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(days=2)


def _name(common: str, organization: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )


class Authority:
    """Signs; writes `NAME.crt` and `NAME.key` into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name("tandem-test-ca")
        builder = self._builder(self._subject, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self._write(folder / "ca.crt", builder)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + _LIFE)
        )

    def _write(self, path: Path, builder: x509.CertificateBuilder) -> None:
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def client(self, name: str, common: str, organization: str | None = None) -> None:
        """A certificate with which user `common` of group `organization` signs in."""
        self._issue(name, _name(common, organization), ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def server(self, name: str, addresses: Sequence[str], names: Sequence[str]) -> None:
        """A certificate of a server that has these addresses and names."""
        also: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        also += [x509.DNSName(one) for one in names]
        self._issue(name, _name(name), ExtendedKeyUsageOID.SERVER_AUTH, also)

    def _issue(self, name: str, subject: x509.Name, use: x509.ObjectIdentifier, also: list[x509.GeneralName]) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        _write_key(self._folder / f"{name}.key", key)
        builder = self._builder(subject, key).add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if also:
            builder = builder.add_extension(x509.SubjectAlternativeName(also), critical=False)
        self._write(self._folder / f"{name}.crt", builder)


def signing_pair(folder: Path, name: str) -> None:
    """An RSA pair, `NAME.key` and `NAME.pub`, that signs service-account tokens."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    _write_key(folder / f"{name}.key", key)
    (folder / f"{name}.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
