# The first code of ours that runs on a host, sent over stdin (see launcher/bundle.py for the head's side).
# It must run on any Python 3, so that an old one gets a clear answer; hence no annotations and no f-strings.
#
#   host -> head   the marker, then the version of this Python
#   head -> host   one line: digest of the package and its size
#   host -> head   "have" or "need"
#   head -> host   the package, if needed: a tar whose digest is checked before a byte of it is used
#
# Then this process becomes the warden. What a login shell printed before the marker is skipped by the head.
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import time

KEEP_S = 30 * 86400


def say(text):
    data = text.encode()
    while data:
        data = data[os.write(1, data) :]


def read_exactly(size):
    parts = []
    while size:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            sys.exit(1)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_line():
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(1)
    return line.decode().split()


def tree_digest(root):
    """As launcher/bundle.py computes it: over sorted relative paths and the SHA-256 of each file."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    whole = hashlib.sha256()
    for path in sorted(files):
        with open(os.path.join(root, path), "rb") as file:
            whole.update((path + "\0" + hashlib.sha256(file.read()).hexdigest() + "\n").encode())
    return whole.hexdigest()


def is_ours(root, digest):
    try:
        state = os.lstat(root)
        return state.st_uid == os.getuid() and state.st_mode & 0o077 == 0 and tree_digest(root) == digest
    except OSError:
        return False


def cache_folders():
    """Where the package may lie, best first: private folders of ours that can be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (os.path.join(base, "dstrain"), os.path.join(tempfile.gettempdir(), "dstrain-%d" % os.getuid())):
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if os.lstat(folder).st_uid == os.getuid() and os.access(folder, os.W_OK):
                os.chmod(folder, 0o700)
                yield folder
        except OSError:
            continue


def unpack(package, digest, root):
    """Write the package beside `root` and rename it there; nothing is left when that fails."""
    fresh = tempfile.mkdtemp(dir=os.path.dirname(root))
    try:
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            for member in archive.getmembers():
                if not member.isfile() or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise OSError("odd name in the package: " + member.name)
                path = os.path.join(fresh, member.name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(archive.extractfile(member).read())
        if tree_digest(fresh) != digest:
            raise OSError("the package arrived damaged")
        try:
            os.rename(fresh, root)
        except OSError:  # another run was faster, or what is there is damaged
            if not is_ours(root, digest):
                os.rename(root, tempfile.mkdtemp(dir=os.path.dirname(root)) + "/damaged")
                os.rename(fresh, root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def install(package, digest, folders):
    """Into the first folder that takes it."""
    problem = "neither ~/.cache nor the temporary folder can be written"
    for folder in folders:
        try:
            unpack(package, digest, os.path.join(folder, digest))
            return os.path.join(folder, digest)
        except (OSError, tarfile.TarError) as error:
            problem = "%s: %s" % (folder, error)
    say("error no room for the package: " + problem + "\n")
    sys.exit(1)


def prune(folder):
    """Versions that no run has used for a month go."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            if time.time() - os.stat(path).st_mtime > KEEP_S:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def main():
    os.environ.pop("DSTRAIN_STAGE_0", None)
    umask = os.umask(0o077)
    say("%s python %d.%d.%d\n" % ((MARKER,) + sys.version_info[:3]))
    digest, size = read_line()
    folders = list(cache_folders())
    root = next((os.path.join(f, digest) for f in folders if is_ours(os.path.join(f, digest), digest)), None)
    if root:
        say("have\n")
    else:
        say("need\n")
        root = install(read_exactly(int(size)), digest, folders)
        say("installed\n")
    os.utime(root)
    prune(os.path.dirname(root))
    os.umask(umask)
    sys.path.insert(0, root)
    from dstrain.launcher.agent.warden import main as warden

    warden(root)


main()
