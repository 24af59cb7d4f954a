"""Who may ask a policy server: its key, how often a wrong one may be tried, and by what name."""

import asyncio
import base64
import binascii
import collections
import hmac
import ipaddress
import os
import ssl
import time
import urllib.parse

_DELAY_S = 0.2  # before a wrong key is answered
_TRIES, _WINDOW_S = 20, 60.0  # wrong keys of an address, then it waits
_ADDRESSES = 1024  # that are remembered


KEY_VARIABLE = "LIGHTWAM_API_KEY"


def key_of_environment():
    """Returns the key that servers ask for and clients send, from `KEY_VARIABLE`; "" if unset."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def tls(certfile, keyfile):
    """Returns the `ssl.SSLContext` of a server from its PEM files; None without a certificate."""
    if not certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certfile, keyfile or None)
    return context


def is_loopback(host):
    """Returns whether a host, a name or an address, is this machine as only itself sees it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Checks the key of HTTP requests, before anything else of them is read.

    Attributes:
      ticket: "NAME=VALUE" of a cookie that stands for the key at the streams of pages; made of the
        key, so that a page goes on after a restart of the server. "" where there is no key.
    """

    def __init__(self, key=""):
        """Args: key: text; "": everyone may."""
        self._key = key.encode()
        digest = hmac.digest(self._key, b"streams of pages", "sha256").hex()
        # Also in the name: a browser sends the cookies of all ports of a host.
        self.ticket = f"live_{digest[:8]}={digest[8:]}" if key else ""
        self._wrong = collections.OrderedDict()  # address -> times of wrong keys
        self._at = None

    def listens_at(self, host):
        """Takes the host of the server's socket: what `misdirected` goes by."""
        self._at = host

    def misdirected(self, hosts):
        """Returns None, or (HTTP status, text) for a request to another name than the server's.

        Where only this machine can connect and no key is needed, the browser on it must not do so
        for a page from elsewhere, whose name was made to point here (DNS rebinding).

        Args:
          hosts: values of the request's Host headers.
        """
        if self._key or self._at is None or not is_loopback(self._at):
            return None
        try:
            (came,) = hosts
            name = urllib.parse.urlsplit(f"//{came}").hostname or ""
        except ValueError:  # none, several, or no host
            came, name = ", ".join(hosts), ""
        if name == self._at.lower() or is_loopback(name):
            return None
        return 403, (
            f"the Host header is {came[:100]!r}; without a key this server answers to localhost, "
            "127.0.0.1 and [::1] only: use one of them, or give the server a key\n"
        )

    async def refusal(self, address, authorizations):
        """Returns None, or (HTTP status, text).

        Args:
          address: of the client. authorizations: values of its Authorization headers: "Api-Key KEY"
            as openpi's clients send it, "Bearer KEY", or a browser's "Basic" with the key as
            password.
        """
        if not self._key:
            return None
        now = time.monotonic()
        wrong = self._wrong.get(address, ())
        needed = "this server needs a key: Authorization: Api-Key KEY\n"
        if not authorizations:  # nobody guesses without a key: a browser asks so first
            return 401, needed
        if sum(at > now - _WINDOW_S for at in wrong) >= _TRIES:
            return 429, "too many wrong keys from this address; wait a minute\n"
        if len(authorizations) == 1 and hmac.compare_digest(_sent(authorizations[0]), self._key):
            return None
        self._wrong[address] = [*wrong, now][-_TRIES:]
        self._wrong.move_to_end(address)
        while len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)
        await asyncio.sleep(_DELAY_S)
        return 401, needed

    def has_ticket(self, cookies):
        """Returns whether the values of Cookie headers hold the ticket."""
        ticket = self.ticket.encode()
        sent = [
            part.strip().encode("utf-8", "surrogateescape")
            for line in cookies
            for part in line.split(";")
        ]
        return bool(ticket) and any([hmac.compare_digest(each, ticket) for each in sent])


def _sent(authorization):
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    known = scheme.lower() in ("api-key", "bearer")
    return value.strip().encode("utf-8", "surrogateescape") if known else b""
