"""Recognizes files and folders that hold credentials by their names.

Guarantees: capitals make no difference, and neither does the depth in the project; a backup, an
editor's copy or an archive of such a file counts as the file itself; a template of one
(`.env.example`), source code and documentation do not count. Pure.
"""

from __future__ import annotations

import re
from fnmatch import translate

FOLDERS = frozenset(
    {
        # cloud and cluster clients
        *(".aws", ".azure", ".oci", ".gcloud", ".gsutil", ".config/gcloud", ".aliyun", ".bluemix"),
        *(".kube", ".docker", ".minikube", ".helm", ".terraform.d", ".terraform", ".pulumi", ".mc"),
        *(".databricks", ".snowflake", ".snowsql", ".dbt", ".ngc", ".ray", ".chef", ".vault"),
        # keys and passwords
        *(".ssh", ".gnupg", ".password-store", ".secrets", ".credentials", ".pki", ".sops"),
        *("sops/age", ".age", ".cert", ".certs", ".private", ".mozilla", ".thunderbird"),
        # hubs, trackers, package registries, forges
        *(".huggingface", ".kaggle", ".wandb", ".config/wandb", ".config/gh", ".config/hub"),
        *(".config/rclone", ".config/glab-cli", ".config/doctl", ".config/sops", ".config/age"),
        *(".modal", ".replicate", ".runpod", ".cargo/credentials", ".gem", ".mlflow"),
    }
)
"""Names of folders, or the ends of their paths; nothing below them is a project's file."""

KEY_FILES = (
    *("*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.p8", "*.pk8", "*.pkcs12", "*.der", "*.priv"),
    *("*.jks", "*.jceks", "*.keystore", "*.bks", "*.keytab", "*.kdb", "*.kdbx", "*.1pux"),
    *("*.keychain", "*.keychain-db", "*.agilekeychain", "*.opvault", "*.ovpn", "*.gpg", "*.pgp"),
    *("*.privkey", "*.openssh", "secring.*", "ssh_host_*_key", "krb5cc_*", "wg[0-9]*.conf"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "id_xmss*", "identity"),
    *("*_rsa", "*_dsa", "*_ecdsa", "*_ed25519", "*-rsa", "*-ed25519"),
)
"""Containers of keys. Their content may be binary, so a template of one is no exception."""

FILES = (
    # variables of the environment
    *(".env", ".env.*", ".env-*", ".env_*", ".env[0-9]*", "*.env", "*.env.local", ".envrc"),
    *("*.envrc", ".flaskenv", ".renviron*", "local.settings.json"),
    # logins of clients
    *(".netrc", "_netrc", "netrc", ".authinfo*", ".git-credentials*", ".gitcookies", "cookies.txt"),
    *(".npmrc", ".yarnrc", ".pypirc", ".pgpass*", "pgpass.conf", ".my.cnf", ".mylogin.cnf"),
    *(".htpasswd*", "htpasswd", "passwd", "shadow", ".passwd*", "passwd-s3fs", ".smbcredentials"),
    *(
        ".ftpconfig",
        "sftp.json",
        "sftp-config.json",
        "filezilla.xml",
        "sitemanager.xml",
        ".esmtprc",
    ),
    *(".msmtprc", ".fetchmailrc", ".muttrc", ".s3cfg*", "s3cfg", ".boto*", "rclone.conf"),
    *(
        ".rclone.conf",
        ".databrickscfg*",
        ".snowsqlrc",
        ".modal.toml",
        ".dockercfg",
        ".clasprc.json",
    ),
    *(".dockerconfigjson", "dockerconfig.json", "docker-config.json", ".sentryclirc"),
    *(
        "kubeconfig*",
        "*.kubeconfig",
        "*-kubeconfig",
        "*_kubeconfig",
        "kube[-_]config",
        "kube[-_]config.*",
    ),
    *(".terraformrc", "terraform.rc", "*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json"),
    *(".vault-token*", ".vault_pass*", ".vault-pass*", "vault-pass*", "vault_pass*"),
    *("clearml.conf", ".comet.config", ".cometml.config", "auth.json", "kaggle.json"),
    *("settings-security.xml", ".*_history", ".histfile", ".dbshell"),
    # by what they say of themselves
    *("credentials", "credentials.*", ".credentials*", "*credentials*.json", "*credentials*.y*ml"),
    *("*_credentials.*", "*-credentials.*", "*_credentials", "*-credentials"),
    *("credential.*", "creds", "creds.*", ".creds*", "*-creds.*", "*_creds.*"),
    *("secrets", "secrets.*", ".secret*", "*-secrets.*", "*_secrets.*", "*.secrets", "*.secrets.*"),
    *("secret", "secret.*", "*-secret.*", "*_secret.*", "*.secret", "client_secret*.json"),
    *("client-secret*.json", "*accesskeys.csv", "*access_keys.csv", "*access-keys.csv"),
    *("rootkey.csv", "service[-_]account*.json", "serviceaccount*.json", "*adminsdk*.json"),
    *("gcp-key*", "gcp_key*", "*keyfile*.json", "application_default_*", "adc.json"),
    *("private[-_.]key*", "*[-_.]private[-_.]key*", "privatekey*", "privkey*"),
    *("api[-_.]keys", "api[-_.]keys.*", "apikey", "apikey.*", "apikeys", "apikeys.*", ".apikey*"),
    *(
        "password",
        "password.*",
        "passwords",
        "passwords.*",
        ".password*",
        "passphrase",
        "passphrase.*",
    ),
    *("age-key*", "age_key*", "*[-_]age[-_]key*", ".*[-_]key"),
    # tokens; "tokens.txt" is a vocabulary
    *("token", "token.txt", "token.json", "token.pickle", ".token", ".tokens", "*.token"),
    *("stored_tokens", "access_tokens.db", ".*[-_]token", ".*[-_]token.*"),
)
"""Files of text; a template of one is no credential."""

# one pattern instead of many: a project may have many thousand files
_KEY_FILE = re.compile("|".join(map(translate, KEY_FILES)))
_FILE = re.compile("|".join(map(translate, FILES)))

_SERVICES = (
    "hf|huggingface|hub|api|access|auth|oauth|bearer|refresh|github|gh|gitlab|git|npm|pypi|wandb|neptune"
    "|comet|slack|discord|telegram|bot|openai|anthropic|cohere|aws|gcp|google|azure|s3|ray|vault|k8s"
    "|kube|kubernetes|jupyter|docker|registry|deploy|admin|secret|sa|ngc|civitai"
)
_SERVICE_TOKEN = re.compile(
    rf"\.?(?:.*[-_.])?(?:{_SERVICES})[-_.]?(?:api[-_.]?)?(?:access[-_.]?)?(?:token|key)"
    r"(?:\.(?:txt|json|ya?ml|toml|ini|cfg|conf|csv|b64|dat))?"
)
"""`hf_token`, `my-openai-api-key.txt`; not `token`, which stands alone in `FILES`."""

_CODE = re.compile(
    r"\.(?:pyi?|ipynb|md|rst|adoc|jsx?|tsx?|mjs|go|rs|rb|c|h|cc|cpp|hpp|cu|cuh|java|kt|scala|jl|r|cs"
    r"|swift|html?|css|j2|jinja2?|proto|sql|svg|png|tex)"
)
_TEMPLATE = re.compile(
    r"(?:^|[-_.])(?:examples?|samples?|templates?|tmpl|tpl|dist|defaults|schema|skeleton)(?:$|[-_.])"
)
# sealed by a public key, only the name of a secret elsewhere, or hashes of known false alarms
_HARMLESS = re.compile(r"^(?:sealed|external)[-_]?secrets?\b|^\.secrets\.baseline$")

_ARCHIVE = re.compile(r"\.(?:zip|7z|rar|tar|tgz|tbz2?|txz|gz|bz2|xz|zst|lz4|br|b64|base64)$")
_MARK = (
    r"(?:~|#|\.sw[a-z]|[-_. ](?:bak|backup|bkp|old|orig|save|saved|copy|tmp|temp|prev|dump)\d*"
    r"|[-_. ]\(?\d+\)?|[-_.]\d{4}[-_.]?\d\d[-_.]?\d\d[-_.\dt]*|\.(?:enc|decrypted|dec|plain))"
)
_COPY = re.compile(rf"{_MARK}$")
_COPY_BEFORE_SUFFIX = re.compile(rf"{_MARK}(?=\.[a-z]+$)")
_ARCHIVED_FOLDERS = frozenset(
    {"ssh", "aws", "azure", "gnupg", "kube", "docker", "oci", "huggingface", "password-store"}
)
"""An archive of `.ssh` is often called `ssh.tar.gz`."""
_FOLDERS_OF_DATA = frozenset(
    {"secrets", "secret", "credentials", "creds", "private-keys", "private_keys"}
)
"""Folders of credentials, or packages of Python: all below them but code."""


def is_secret_name(path: str) -> bool:
    """Return whether a relative path names a file of credentials, or lies in such a folder."""
    *folders, name = path.lower().split("/")

    for depth in range(len(folders)):
        if _is_secret_folder("/".join(folders[: depth + 1])):
            return True
    if not _FOLDERS_OF_DATA.isdisjoint(folders) and not _is_harmless(name):
        return True

    for spelling in _spellings(name):
        # a file with the name of a folder: a link to it, or the folder packed up
        if _is_secret_folder("/".join([*folders, spelling])) or _is_secret_file(spelling):
            return True
    return False


def _is_secret_folder(path: str) -> bool:
    name = path.rpartition("/")[2].strip()
    last_two = "/".join(path.split("/")[-2:])
    return name in FOLDERS or last_two in FOLDERS


def _spellings(name: str) -> list[str]:
    """Return a name, and the names of what it may be a copy or an archive of."""
    spellings = [name.strip()]
    is_archive = False

    for _ in range(4):  # such as ".env.bak.tar.gz"
        shorter = spellings[-1]
        is_archive = is_archive or bool(_ARCHIVE.search(shorter))
        shorter = _ARCHIVE.sub("", shorter)
        is_swap_file = bool(re.search(r"\.sw[a-z]$", shorter))

        # `#.env#` and `.#.env` are files of editors, `secrets (1).yaml` one of a browser
        shorter = shorter.removeprefix("#").removeprefix(".#")
        shorter = _COPY_BEFORE_SUFFIX.sub("", _COPY.sub("", shorter)).strip()
        for prefix in ("copy of ", "backup-", "backup_", "old-", "old_"):
            shorter = shorter.removeprefix(prefix)

        if shorter in ("", spellings[-1]):
            break
        spellings.append(shorter)
        if is_swap_file:  # vim puts a dot in front of the name
            spellings.append(shorter.removeprefix("."))

    if is_archive and spellings[-1] in _ARCHIVED_FOLDERS:
        spellings.append(f".{spellings[-1]}")
    return spellings


def _is_secret_file(name: str) -> bool:
    """Return whether the name of a file, in lower case, is that of a credential."""
    if _KEY_FILE.match(name):
        return not _is_code(name)
    if _is_harmless(name):
        return False

    return bool(_SERVICE_TOKEN.fullmatch(name) or _FILE.match(name))


def _is_harmless(name: str) -> bool:
    return _is_code(name) or bool(_TEMPLATE.search(name) or _HARMLESS.search(name))


def _is_code(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and _CODE.fullmatch(dot + suffix))
