"""Reads all of a data set and lists all that is wrong with it, before anything is made of it.

    python -m data_prep.check DIR

DIR is a prepared dataset, a folder in the layout of any preparer (`python -m data_prep --help` lists them), any folder
of NIfTI files (a mask is called as its image, with _gt, _seg, _mask, _label or .seg behind it), or a CSV list as
data_prep.folder takes it. Forms and modalities that make a data set each are reported one after the other.

An error makes a case useless, a warning is to be looked at. `prepare` of every layout makes the same checks. Below them
stands how many cases hold each class, by split where DIR says which those are. Exit status 1 if there is an error.
"""

import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep import acdc, chaos, common, folder, la2018, mmwhs, msd, ssl4mis, synapse
from data_prep.common import CaseFacts
from data_prep.folder import Scan
from sscl_jax import cli
from sscl_jax.data import formats
from sscl_jax.data.prepared import SPLITS, Case, CaseSource, PreparedDataset, open_prepared
from sscl_jax.data.workers import map_ahead

NAMED = 8  # names of files that a line lists


class Findings(NamedTuple):
    """What was found in a folder.

    Attributes:
      kind: what the folder is.
      cases: of each case, its split ("all" where there are none, "none" where the splits leave it out), its patient,
        the name of its image, and whether it has a mask.
      facts: of each case.
      names: of the label values; None: as they are found.
      problems, warnings: about the folder as a whole, or files that belong to no case, one line each.
    """

    kind: str
    cases: list[tuple[str, str, str, bool]]
    facts: list[CaseFacts]
    names: dict[int, str] | None
    problems: list[str]
    warnings: list[str]


def check(path: Path, channels: bool = False) -> list[Findings]:
    """Recognises what `path` is and reads all of it: one data set, or one for each modality or form that is there.

    Args:
      path: file or folder.
      channels: the fourth axis of an image of a plain folder or list holds its channels.

    Raises:
      FileNotFoundError, ValueError: it is nothing that can be checked, or a prepared dataset that cannot be opened.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a data set")
    if (path / "metadata.json").is_file() or (path / "cache" / "index.json").is_file():
        return [check_prepared(path)]
    if any(path.glob("training/patient*")) or any(path.glob("database/training/patient*")):
        return [check_acdc(path)]
    if (path / "dataset.json").is_file():
        return [check_msd(path)]
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return [check_scans("CSV list", *folder.list_csv(path), [], channels)]
    if (path / "images").is_dir() or (path / "imagesTr").is_dir():
        others = [f"{other}: is no scan: it is ignored" for other in folder.other_files(path)]
        return [check_scans("folder of images and masks", *folder.list_folder(path), others, channels)]
    if any(path.glob("data/*.h5")) or any(path.glob("data/slices/*.h5")):
        return [check_ssl4mis(path)]
    if found := check_archives(path):
        return found
    scans, problems = list_nifti(path)
    if scans:
        return [check_scans("folder of NIfTI files", scans, problems, [], channels)]
    if path.is_file():
        raise ValueError(f"{path}: is no list that is known: save it as CSV, with the ending .csv")
    there = common.few([p.name for p in sorted(path.glob("*"))], NAMED)
    raise FileNotFoundError(
        f"{path}: nothing there that is known ({there or 'empty'}): give the folder "
        "of a data set, as `python -m data_prep` lists them"
    )


def check_prepared(path: Path) -> Findings:
    """Reads the cases of a prepared dataset."""
    dataset = open_prepared(path)
    checked = map_ahead(functools.partial(_prepared_facts, dataset), dataset.cases)
    facts = list(tqdm(checked, "checking", len(dataset.cases), unit=" cases", disable=None))
    cases = [(case.split, case.patient_id, case.source, case.has_label) for case in dataset.cases]
    sources = [  # what it was prepared from need not be there any more: each case is named instead
        CaseSource(
            c.case_id, c.patient_id, c.split, (Path(_name(dataset, c)),), Path(c.case_id) if c.has_label else None
        )
        for c in dataset.cases
    ]
    common.tell_doubles(sources, facts)
    names = dict(zip(dataset.recipe.label_values, dataset.recipe.class_names, strict=True))
    skipped = [f"left out when it was prepared: {line}" for line in dataset.skipped]
    return Findings("prepared dataset", cases, facts, names, [], skipped)


def _prepared_facts(dataset: PreparedDataset, case: Case) -> CaseFacts:
    """Reads one case of a prepared dataset."""
    problems, values = [], frozenset[int]()
    where = _name(dataset, case)
    image = dataset.image(case.index)
    if not np.isfinite(image).all():
        problems.append(f"{where}: its image has voxels that are not finite: prepare again")
    if case.has_label:
        native, label = dataset.native_label(case.index), dataset.label(case.index)
        if max(native.max(), label.max()) >= dataset.num_classes:
            problems.append(f"{where}: its label has a class beyond {dataset.num_classes - 1}: prepare again")
        else:
            values = frozenset(dataset.recipe.label_values[c] for c in np.unique(native))
    digest = common.digest_of(image)
    return CaseFacts(problems, [], dataset.channels, values, case.grid.native_spacing, digest)


def _name(dataset: PreparedDataset, case: Case) -> str:
    return f"{dataset.path}, case {case.case_id}"


def check_acdc(path: Path) -> Findings:
    """Reads ACDC's archive; patients whom the splits leave out are read as well."""
    own = path / "splits.json"
    patients = common.read_splits(own if own.is_file() else acdc.PACKAGED_SPLITS)
    split_of = {patient: split for split in SPLITS for patient in patients[split]}
    folders = acdc.find_patients(path)
    sources, ignored, problems = acdc.list_cases(folders, folders, split_of)
    names = dict(zip(acdc.LABEL_VALUES, acdc.CLASSES, strict=True))
    told = common.few(ignored, NAMED)
    others = [f"{path}: {len(ignored)} files are not frames that Info.cfg names, and are ignored: {told}"]
    return check_sources("ACDC", sources, names, problems, others if ignored else [])


def check_msd(path: Path) -> Findings:
    """Reads a task of the Medical Segmentation Decathlon, test images included."""
    content, problems = msd.read_description(path / "dataset.json")
    names, more = msd.read_labels(content, path / "dataset.json")
    channels, _, wrong = msd.read_modality(content, path / "dataset.json", None)
    sources, unpaired = msd.list_sources(path, content, channels)
    if (path / "splits.json").is_file():
        sources = common.put_into_splits(sources, folder.read_splits(sources, path / "splits.json"), "none")
    problems += more + wrong + unpaired
    return check_sources("Medical Segmentation Decathlon", sources, names or None, problems, [])


def check_archives(path: Path) -> list[Findings]:
    """Reads what the preparers know whose archives hold several data sets, one for each form or modality."""
    layouts: list[tuple[str, ModuleType, tuple[str, ...], dict[int, str]]] = [
        *(("left atrium 2018", la2018, (form,), names) for form, names in la2018.CLASSES.items()),
        *(("CHAOS", chaos, (modality,), names) for modality, names in chaos.CLASSES.items()),
        *(("MM-WHS", mmwhs, (modality,), mmwhs.CLASSES) for modality in ("ct", "mr")),
        ("Synapse", synapse, (), synapse.ORGANS),
    ]
    findings = []
    for kind, module, options, names in layouts:
        try:
            sources, problems = module.list_sources(path, *options)
        except FileNotFoundError:
            continue  # not there
        if module is la2018:
            sources = common.put_into_splits(sources, common.read_splits(la2018.PACKAGED_SPLITS), "none")
        if module is synapse:
            patients = folder.read_splits(sources, synapse.PACKAGED_SPLITS)
            sources = common.put_into_splits(sources, patients, "none")
        findings.append(check_sources(", ".join([kind, *options]), sources, names, problems, []))
    return findings


def check_ssl4mis(path: Path) -> Findings:
    """Reads the files of SSL4MIS's layout, those that its lists leave out as well."""
    # Any spacing will do: nothing here is measured in mm.
    sources, problems = ssl4mis.list_sources(path, spacing=(1.0, 1.0, 1.0))
    try:
        sources, _, more = ssl4mis.take_lists(sources, path)
        problems += more
    except FileNotFoundError as error:
        problems.append(str(error))
    is_acdc = all(re.fullmatch(r"patient\d{3}_frame\d\d", source.case_id) for source in sources)
    names = dict(enumerate(ssl4mis.CLASSES)) if is_acdc else None
    told = f"{path}: its files hold no voxel size: prepare asks for it with --spacing"
    return check_sources("SSL4MIS", sources, names, problems, [told])


def check_scans(
    kind: str, scans: Sequence[Scan], problems: Sequence[str], others: Sequence[str], channels: bool
) -> Findings:
    """Reads listed scans; `channels`: see `check`."""
    joined, told = folder.join_patients(list(scans))
    named, more = folder.name_patients(joined, None)
    sources = folder.to_sources(named, channels)
    more += folder.listed_splits(sources)[1]
    return check_sources(kind, sources, None, [*problems, *more], [*others, *(told if joined != list(scans) else [])])


def check_sources(
    kind: str,
    sources: Sequence[CaseSource],
    names: dict[int, str] | None,
    problems: Sequence[str],
    others: Sequence[str],
) -> Findings:
    """Reads the files of all cases, as `prepare` does before it writes anything."""
    if not sources:
        problems = [*problems, "no case was found: give the folder of a data set"]
    facts = common.examine(sources, None if names is None else sorted(names))
    cases = [(s.split, s.patient_id, s.image_paths[0].name, s.label_path is not None) for s in sources]
    return Findings(kind, cases, facts, names, list(problems), list(others))


def list_nifti(path: Path) -> tuple[list[Scan], list[str]]:
    """Images at any depth of a folder, or the one file, with the masks beside them; problems, one line each."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [p for p in found if p.name.lower().endswith(formats.NIFTI) and p.name[0] != "." and p.is_file()]
    problems = [
        line
        for each in sorted({p.parent for p in files})
        for line in common.by_stem([p for p in files if p.parent == each])[1]
    ]
    place = {p: str(p.parent / formats.stem(p)).removesuffix("_image") for p in files}
    masks = {}
    for p, name in place.items():
        image = formats.without_mask_ending(name)
        if image != name and image in place.values():
            masks[image] = p
    base = path if path.is_dir() else path.parent
    return [
        Scan("_".join(Path(name).relative_to(base).parts), p, masks.get(name))
        for p, name in place.items()
        if p not in masks.values()
    ], problems


def report(path: Path, findings: Findings) -> tuple[str, int]:
    """The text to print, and how many errors it lists."""
    cases, facts = findings.cases, findings.facts
    problems = [*findings.problems, *(line for fact in facts for line in fact.problems)]
    warned = [*findings.warnings, *(line for fact in facts for line in fact.warnings)]
    unlabelled = [image for _, _, image, has_mask in cases if not has_mask]
    if unlabelled:
        what = f"{len(unlabelled)} of {len(cases)} images have no mask and count as unlabelled"
        warned.append(f"{path}: {what}: {common.few(unlabelled, NAMED)}")

    names = findings.names or {
        value: f"label {value}" if value else "background" for value in sorted({0}.union(*(f.values for f in facts)))
    }
    columns = [split for split in (*SPLITS, "all", "none") if any(case[0] == split for case in cases)]
    held = [
        (case[0], fact.values & names.keys())
        for case, fact in zip(cases, facts, strict=True)
        if case[3] and fact.values
    ]
    if "train" in columns:
        warned += common.absent_classes(held, names)
    rows = [
        ["", *columns],
        ["patients", *(str(len({p for s, p, *_ in cases if s == split})) for split in columns)],
        ["cases", *(str(sum(case[0] == split for case in cases)) for split in columns)],
        ["  with a mask", *(str(sum(case[0] == split and case[3] for case in cases)) for split in columns)],
        *common.class_rows(held, names, columns),
    ]
    lines = [f"{path}: {findings.kind}, {len(cases)} cases"]
    lines += [f"error: {line}" for line in problems] + [f"warning: {line}" for line in warned]
    lines += common.align(rows) + [f"{len(problems)} error(s), {len(warned)} warning(s)"]
    return "\n".join(lines), len(problems)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.make_parser("data_prep.check", __doc__)
    parser.add_argument("path", type=Path, metavar="DIR", help="see above")
    parser.add_argument("--channels", action="store_true", help="the fourth axis of an image holds its channels")
    args = cli.parse(parser, argv)
    reports = [report(args.path, findings) for findings in check(args.path, args.channels)]
    print("\n\n".join(text for text, _ in reports))
    sys.exit(1 if any(errors for _, errors in reports) else 0)


if __name__ == "__main__":
    common.run(main)
