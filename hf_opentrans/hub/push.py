"""Publishing on the Hugging Face Hub: one commit per push, so that a reader sees the old model or the new one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Unpack, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel

from hf_opentrans.pruning.channels import ChannelPruningResult
from hf_opentrans.pruning.elastic import ElasticResult
from hf_opentrans.pruning.prune import PruningResult
from hf_opentrans.pruning.subnetwork import SUBNETWORK_FOLDER

from .evidence import CardOptions, Evidence, recorded_base
from .folder import PreparedFolder, prepare_folder
from .licence import CARD_FILE, Licence, check_repo_id, is_hub_id, licence_of_card

MESSAGE = "Upload a pruned model with hf_opentrans"
# The client's errors of transport (no route, refused, cut, timed out) share a base with its errors of status.
_TRANSPORT = cast("type[Exception]", HfHubHTTPError.__mro__[1])
# A commit whose answer is lost on its way back has happened all the same.
_UNHARMED = "The repository has what it had, or all of the push."
_AGAIN = "push again: files that arrived are not sent again."
_STATUS_FIX = {
    401: "The token is missing, wrong or expired. Log in with `hf auth login`, or pass a token that may write.",
    403: "The token may not write there. Use a token with write access to this owner, or another name.",
    404: "There is no such repository or branch, or the token may not see it. Check the name and the token.",
    409: "The repository changed meanwhile. Push again.",
    413: "A file is larger than the Hub takes. Save the model in smaller shards.",
    429: "The Hub asks to wait. Wait, and push again: files that arrived are not sent again.",
}


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Args:
        repo_id: Of the repository.
        url: Of its page.
        commit: Hash of the commit; that of the latest one where nothing had changed.
        revision: Branch.
        pull_request: Page of the pull request; None without one.
        prepared: What was published; its folder is gone.
    """

    repo_id: str
    url: str
    commit: str
    revision: str
    pull_request: str | None
    prepared: PreparedFolder


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = MESSAGE,
    **card: Unpack[CardOptions],
) -> PushResult:
    """Publish a model's folder with its card, in one commit.

    An upload that is interrupted leaves the repository as it was; the same call then goes on: the Hub already has the
    large files that arrived, and files that have not changed are not committed again. Weights and subnetworks of an
    earlier push that are no longer part of the model are deleted in the same commit.

    Args:
        folder: Of the model, as pruning, transfer or fine-tuning wrote it. It stays as it is.
        repo_id: "owner/name"; it is created where there is none.
        private: Whether a new repository is private.
        revision: Branch; created from the main one where there is none. Defaults to the main branch.
        token: Defaults to the one of `hf auth login` or of the variable HF_TOKEN. It is neither shown nor stored.
        create_pr: Whether to open a pull request instead.
        commit_message: Of the commit.
        **card: What the card shall say; see `build_card`.

    Raises:
        FileNotFoundError: If a folder or a file is missing.
        ValueError: If the name is no repository, there is no token, or the folder cannot be published: see
            `prepare_folder`.
        ConnectionError: If the Hub cannot be reached.
        RuntimeError: If the Hub refuses.
    """
    _check_target(repo_id, revision, token, create_pr=create_pr)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="hf-opentrans-push-") as temporary:
        if card.get("base_licence") is None and (found := _licence_on_hub(api, folder, card)) is not None:
            card["base_licence"] = found
        prepared = prepare_folder(folder, Path(temporary) / "repository", repo_id=repo_id, **card)
        with _clear_hub_errors(repo_id, token):
            prepared.card.validate()  # before anything is created
            full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(full_name, branch=revision, exist_ok=True)
            additions = [CommitOperationAdd(name, prepared.path / name) for name, _ in prepared.files]
            names = {name for name, _ in prepared.files}
            remote = api.list_repo_files(full_name, revision=None if create_pr else revision)
            gone = [CommitOperationDelete(name) for name in remote if _is_ours(name) and name not in names]
            commit = api.create_commit(
                full_name, [*gone, *additions], commit_message=commit_message, revision=revision, create_pr=create_pr
            )
    url = f"{api.endpoint}/{full_name}"
    branch = commit.pr_revision or revision or constants.DEFAULT_REVISION
    return PushResult(full_name, url, commit.oid, branch, commit.pr_url, prepared)


def push_model(model: PreTrainedModel, processor: Any, repo_id: str, **options: Any) -> PushResult:
    """Publish a model with its processor and a card.

    The card of a model alone has no figures of its pruning: these are in the folder that pruning wrote.

    Args:
        model: A model of this package, or a CLIP.
        processor: Of the model; None for a vision tower that shall be published without.
        repo_id: "owner/name".
        **options: See `push_folder`.

    Raises:
        ValueError: See `push_folder`.
        ConnectionError: If the Hub cannot be reached.
        RuntimeError: If the Hub refuses.
    """
    _check_options(repo_id, options)
    with tempfile.TemporaryDirectory(prefix="hf-opentrans-save-") as temporary:
        folder = Path(temporary) / _last(repo_id)
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        return push_folder(folder, repo_id, **options)


def push_to_hub(
    source: str | Path | PruningResult | ChannelPruningResult | ElasticResult | PreTrainedModel,
    repo_id: str,
    processor: Any = None,
    **options: Any,
) -> PushResult:
    """Publish a folder, the result of a pruning, or a model.

    Args:
        source: What to publish. A result brings its report and its subnetwork.
        repo_id: "owner/name".
        processor: Of a result or a model; a folder has its own.
        **options: See `push_folder`.

    Raises:
        TypeError: If the source is none of these, or a folder with a processor.
        ValueError: See `push_folder`.
        ConnectionError: If the Hub cannot be reached.
        RuntimeError: If the Hub refuses.
    """
    if isinstance(source, str | Path):
        if processor is not None:
            raise TypeError(
                f"A processor is given with the folder {str(source)!r}. A folder has its own. Leave the processor out."
            )
        return push_folder(source, repo_id, **options)
    if isinstance(source, PreTrainedModel):
        return push_model(source, processor, repo_id, **options)
    if not isinstance(source, PruningResult | ChannelPruningResult | ElasticResult):
        raise TypeError(
            f"The source is a {type(source).__name__}. Published are folders, results of prune_model, "
            "prune_channels and prune_elastic, and models. Give one of these."
        )
    _check_options(repo_id, options)
    with tempfile.TemporaryDirectory(prefix="hf-opentrans-save-") as temporary:
        folder = Path(temporary) / _last(repo_id)
        source.save_pretrained(folder, processor)
        return push_folder(folder, repo_id, **options)


def _check_options(repo_id: str, options: dict[str, Any]) -> None:
    given = (options.get(key) for key in ("revision", "token"))
    _check_target(repo_id, *given, create_pr=bool(options.get("create_pr")))


def _check_target(repo_id: str, revision: str | None, token: str | None, *, create_pr: bool) -> None:
    """Refuse what the Hub would refuse, before anything is read."""
    check_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(
            f"A pull request is asked for, and the revision {revision!r}. A pull request goes to the main branch. "
            "Leave one of them out."
        )
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            "HF_HUB_OFFLINE is set. Publishing needs the Hub. Unset it, or only prepare the folder (--dry-run)."
        )
    if not (token or get_token()):
        raise ValueError(
            "There is no access token. The Hub takes files of known users alone. Log in with `hf auth login`, or set "
            "the variable HF_TOKEN."
        )


def _licence_on_hub(api: HfApi, folder: str | Path, card: CardOptions) -> Licence | None:
    """Ask the Hub for the licence of the base, where nothing here knows it; None where that does not either."""
    options: dict[str, Any] = {key: card.get(key) for key in ("base", "base_model")}
    evidence = Evidence.read(folder, **options)
    recorded, revision, _ = recorded_base(evidence.documents)
    name = card.get("base_model") or recorded
    if evidence.licence is not None or name is None or not is_hub_id(name):
        return None
    with _clear_hub_errors(name, None):
        try:
            card_file = api.hf_hub_download(name, CARD_FILE, revision=revision if name == recorded else None)
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            return None
    return licence_of_card(Path(card_file))


def _is_ours(name: str) -> bool:
    """Tell whether a file in a repository is one that a push writes and another must not leave behind."""
    weights = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name.startswith(f"{SUBNETWORK_FOLDER}/")


@contextmanager
def _clear_hub_errors(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn what the client raises into sentences that say what to do."""
    try:
        yield
    except HfHubHTTPError as err:
        _refused(err, repo_id, token)
    except (LocalTokenNotFoundError, ValueError) as err:  # metadata that it does not know, a file that is too large
        raise ValueError(
            f"The Hub does not accept the push to {repo_id!r} ({_reason(err, token)}). Card and files must keep to "
            "its rules. Correct what it names, and push again."
        ) from err
    except (OfflineModeIsEnabled, ConnectionError, TimeoutError, _TRANSPORT) as err:
        raise ConnectionError(
            f"The Hub cannot be reached ({_reason(err, token)}). Publishing needs the network. {_UNHARMED} Check the "
            f"connection and {_AGAIN}"
        ) from err
    except RuntimeError as err:  # the client's word for a large file that did not arrive
        raise RuntimeError(
            f"The upload to {repo_id!r} broke off ({_reason(err, token)}). Every file must arrive. {_UNHARMED} "
            f"Check the connection and {_AGAIN}"
        ) from err


def _refused(err: HfHubHTTPError, repo_id: str, token: str | None) -> NoReturn:
    status = cast("int | None", getattr(err.response, "status_code", None))
    is_ours = status is not None and status < 500  # or the server's own fault
    other = "Correct what it names." if is_ours else f"{_UNHARMED} Wait and {_AGAIN}"
    fix = _STATUS_FIX.get(status or 0, other)
    said = _without(token, " ".join((err.server_message or "").split())).rstrip(".")
    raise RuntimeError(
        f"The Hub refused the push to {repo_id!r} (status {status}{': ' if said else ''}{said}). {fix}"
    ) from err


def _reason(err: Exception, token: str | None) -> str:
    parts = [" ".join(str(each).split()) for each in (err, err.__cause__) if each is not None and str(each)]
    return _without(token, ": ".join(parts)).rstrip(".") or type(err).__name__


def _without(token: str | None, text: str) -> str:
    for secret in {token, get_token()} - {None, ""}:
        text = text.replace(cast("str", secret), "***")
    return text


def _last(repo_id: str) -> str:
    return repo_id.rpartition("/")[2] or "model"
