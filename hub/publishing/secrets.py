"""What looks like a secret in a text, and paths of this machine: detect-secrets' detectors, and forms that it doesn't know.

Its detectors of a known form are used; those that guess by randomness or keywords would take hashes and code for secrets.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import BasePlugin
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.cloudant import CloudantDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector


DETECTORS: tuple[BasePlugin, ...] = (
    AWSKeyDetector(),
    AzureStorageKeyDetector(),
    BasicAuthDetector(),
    CloudantDetector(),
    DiscordBotTokenDetector(),
    GitHubTokenDetector(),
    GitLabTokenDetector(),
    JwtTokenDetector(),
    MailchimpDetector(),
    NpmDetector(),
    OpenAIDetector(),
    PrivateKeyDetector(),
    PypiTokenDetector(),
    SendGridDetector(),
    SlackDetector(),
    SquareOAuthDetector(),
    StripeDetector(),
    TelegramBotTokenDetector(),
    TwilioKeyDetector(),
)
NO_NAME = r"(?![A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+[\"'\s])"
"""Not the name of a variable of the environment, as `API_KEY = "SERVICE_API_KEY"` has it."""
OTHERS = {
    name: re.compile(pattern)
    for name, pattern in {
        "a Hugging Face token": r"\b(?:hf_|api_org_)[A-Za-z0-9]{30,}\b",
        "a GitHub token": r"\bgithub_pat_[A-Za-z0-9_]{30,}\b",
        "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
        "an API key": r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{20,}\b",
        "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
        "a netrc login": r"(?i)\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+",
        "a key or password": (
            r"(?im)\b[\w-]*(?:(?:api|access|private|secret)[_-]?key|secret|(?:access|auth)_?token|password|passwd)[\"']?\s*[:=]\s*"
            rf"(?:[\"']{NO_NAME}[A-Za-z0-9+/=_-]{{16,}}[\"']|(?=\S*\d){NO_NAME}[A-Za-z0-9+/=_-]{{16,}}\s*$)"
        ),
        "a login in an address": r"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']{4,}@",
    }.items()
}

ROOTS = "home|Users|root|tmp|mnt|data|workspace|scratch|opt|var|srv|media|private|content|gpfs|lustre"
START = r"(?:(?<![\w./:~<)-])|(?<=file://))"
"""Before an absolute path: nothing that makes it the rest of an address or of a relative path."""
REST = r"/[\w.~-]+(?:/[\w.~-]+)*"
LOCAL_PATH = re.compile(
    rf"{START}/(?:{ROOTS}){REST}|(?<![\w])[A-Za-z]:\\{{1,2}}(?:Users|Documents|data|temp|tmp)\\[\w.~\\-]+", re.ASCII
)


def secrets_in(text: str) -> Iterator[tuple[str, int]]:
    """Kind and place, in characters, of what looks like a secret: the first of each kind."""
    kinds: set[str] = set()
    for what, pattern in OTHERS.items():
        if match := pattern.search(text):
            kinds.add(what.removeprefix("a "))
            yield what, match.start()
    for detector in DETECTORS:
        what = f"a secret ({detector.secret_type})"
        secret = next((value for value in detector.analyze_string(text) if value), None)
        if secret is not None and detector.secret_type.lower() not in kinds:
            yield what, max(0, text.find(secret))


def own_folders(folder: Path | None) -> re.Pattern[str]:
    """Matches this machine's folders: home, working folder, temporary folder, and the one that is published."""
    places = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *([folder.resolve()] if folder else [])}
    names = sorted({str(place) for place in places if len(place.parts) > 1}, key=len, reverse=True)
    return re.compile(f"{START}(?:{'|'.join(map(re.escape, names))}){REST}", re.ASCII)
