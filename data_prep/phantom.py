"""Seeded short-axis cardiac MR phantoms, written as NIfTI in ACDC's official layout.

    python -m data_prep.phantom --output data/phantom

They stand in for ACDC where no data may be downloaded: a demonstration, a test, a first look. A
patient is drawn as geometry in millimetres (`draw_patient`), sampled finer than the voxel grid
(`rasterise`), and turned into an MR image by averaging over each thick voxel and adding coil bias,
ghosting, blur and Rician noise (`to_mr`). Shapes, position, contrast and artefacts differ
between patients, so that a few labelled ones are meant not to cover the rest.

Layout: `training/patientNNN/{Info.cfg, patientNNN_frameXX.nii.gz, patientNNN_frameXX_gt.nii.gz}`,
`splits.json` (patient ids of train, val and test) and `phantom.json` (the parameters).
Labels: 0 background, 1 right ventricle cavity, 2 myocardium, 3 left ventricle cavity (papillary
muscles included). Voxels are in (X, Y, Z) order with an LPS affine in millimetres; slice 0 is the
base of the heart, as in ACDC. Unlike ACDC's own files, whose sform is a unit matrix beside the true
pixdim, the affine here carries the spacing.
"""

import functools
import gzip
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from sscl_jax import cli

VERSION = 1  # raise it when the same seed would give other files
GROUPS = ("NOR", "DCM", "HCM", "MINF", "RV")  # ACDC's five groups of patients
PHASES = ("ED", "ES")
SUBSAMPLES = (4, 2, 2)  # points per voxel along z, x, y
ANGLES = 2048  # entries of a table over the circle: 0.1 mm on the heart's outline


class Tissue(IntEnum):
    """What fills a point; the index into a patient's contrast table."""

    AIR = 0
    LUNG = 1
    FAT = 2
    MUSCLE = 3
    BONE = 4
    LIVER = 5
    SPLEEN = 6
    BOWEL_WALL = 7
    BOWEL_BRIGHT = 8
    BOWEL_DARK = 9
    CORD = 10
    VESSEL = 11
    ATRIUM = 12
    PERICARDIAL_FAT = 13
    RV_WALL = 14
    RV_BLOOD = 15
    RV_TRABECULA = 16
    MYOCARDIUM = 17
    LV_BLOOD = 18
    PAPILLARY = 19


LABEL_OF_TISSUE = np.zeros(len(Tissue), np.uint8)
LABEL_OF_TISSUE[[Tissue.RV_BLOOD, Tissue.RV_TRABECULA]] = 1
LABEL_OF_TISSUE[Tissue.MYOCARDIUM] = 2
LABEL_OF_TISSUE[[Tissue.LV_BLOOD, Tissue.PAPILLARY]] = 3


@dataclass(frozen=True)
class Blob:
    """A rotated ellipsoid of one tissue; lengths in mm, angle in radians."""

    tissue: Tissue
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    angle: float = 0.0


@dataclass(frozen=True)
class Ventricles:
    """The heart in one phase; z runs from the ED base (0) to the apex, lengths in mm."""

    base: float  # z of the LV base plane
    endo_length: float  # LV cavity, base to tip
    epi_length: float
    endo_radius: float  # at the base
    wall: float  # mean wall thickness at the base
    infarct: float  # fraction of the wall missing in the infarcted sector
    rv_base: float
    rv_length: float
    rv_width: float  # from the septum to the free wall, at the base
    papillary: tuple[Blob, ...]  # in units of the endocardial radius in-plane, of the cavity length along z


@dataclass(frozen=True)
class Anatomy:
    """One patient, drawn: geometry in mm around the heart, how it is sampled, and how it looks."""

    group: str
    height: float  # cm
    weight: float  # kg
    frames: int
    es_frame: int
    # sampling
    shape: tuple[int, int, int]  # X, Y, Z
    spacing: tuple[float, float, float]  # mm
    first_slice: float  # z of the centre of slice 0
    rotation: float  # of the whole scene, radians
    shift: tuple[float, float]  # heart centre from the image centre
    slice_shift: np.ndarray  # (Z, 2), breath-holds that differ
    dtype: str
    # heart
    ventricles: dict[str, Ventricles]
    lean: tuple[float, float]  # in-plane drift of the long axis, mm per mm
    profile: float  # how blunt the apex is
    endo_waves: tuple[tuple[int, float, float], ...]  # (order, relative amplitude, phase)
    wall_waves: tuple[tuple[int, float, float], ...]
    infarct_angle: float
    rv_angle: float  # direction from the LV centre to the RV
    rv_span: float  # tangential half-size over the epicardial radius
    rv_skew: float
    fat_around_heart: tuple[float, float, float]  # mean mm, relative amplitude, angle of the maximum
    # the rest of the body
    body_centre: tuple[float, float]
    body_radii: tuple[float, float]
    wall_layers: tuple[float, float]  # fat and muscle under the skin, mm
    rib_phase: float
    diaphragm: tuple[float, float, float, float]  # height at the base, rise per mm of z, slope, curvature
    abdomen: tuple[Blob, ...]
    lung_vessels: tuple[Blob, ...]
    thorax: tuple[Blob, ...]
    basal: tuple[Blob, ...]  # atria and great vessels, only above the base of the ventricles
    warp: np.ndarray  # (waves, 6): kx, ky, kz, phase, amplitude x, amplitude y
    # appearance
    contrast: np.ndarray  # (tissues,) mean signal, blood near 1
    texture: np.ndarray  # (tissues,) amplitude of the low-frequency texture
    gamma: float
    noise: float  # standard deviation in each of the two channels
    bias: np.ndarray  # (5,) log-gain: x, y, xx, yy, xy over the field of view
    ghost: tuple[int, float, int]  # axis, strength, shift in voxels
    blur: float  # voxels
    scale: float  # signal of blood in the file


# ------------------------------------------------------------------------------------------ drawing


def draw_patient(rng: np.random.Generator, group: str) -> Anatomy:
    """Draws one patient of an ACDC group (`GROUPS`): all that is random but texture and noise."""
    u = rng.uniform
    ventricles = _draw_ventricles(rng, group)
    ed = ventricles["ED"]
    epi_radius = ed.endo_radius + ed.wall

    spacing_xy = u(1.4, 2.0)
    shape_xy = [int(np.clip(2 * round(u(170, 210) / spacing_xy / 2), 96, 128)) for _ in range(2)]
    thickness = round(u(8, 10), 1)
    slices = int(np.clip(np.ceil(ed.epi_length / thickness) + rng.integers(0, 2), 6, 9))
    weight = u(50, 105)

    rv_angle = np.pi + u(-0.25, 0.95)  # left of the LV in the image, mostly in front of it
    fat = 4 + 0.28 * (weight - 50) + u(0, 8)
    body_radii = (u(105, 140), u(100, 130))
    # the chest wall passes in front of the heart (up) and beside it (right)
    body_centre = (
        epi_radius + fat + u(18, 50) - body_radii[0],
        body_radii[1] - epi_radius - fat - u(14, 38),
    )

    return Anatomy(
        group=group,
        height=round(u(150, 192)),
        weight=round(weight),
        frames=(frames := int(rng.integers(20, 36))),
        es_frame=int(round(frames * u(0.32, 0.45))),
        shape=(shape_xy[0], shape_xy[1], slices),
        spacing=(round(spacing_xy, 4), round(spacing_xy, 4), thickness),
        first_slice=u(-0.75, 0.45) * thickness,
        rotation=u(-0.45, 0.45),
        shift=(u(-16, 16), u(-16, 16)),
        slice_shift=rng.normal(0, 1.0, (slices, 2)),
        dtype=("int16", "float32")[int(rng.integers(2))],
        ventricles=ventricles,
        lean=(u(-0.05, 0.25), u(-0.1, 0.15)),
        profile=u(1.9, 2.9),
        endo_waves=tuple((k, u(0, a), u(0, 2 * np.pi)) for k, a in ((2, 0.1), (3, 0.04), (5, 0.02), (8, 0.02))),
        wall_waves=(
            (1, u(0.3, 0.5) if group == "HCM" else u(0, 0.2), rv_angle + u(-0.6, 0.6)),
            (2, u(0, 0.12), u(0, 2 * np.pi)),
            (3, u(0, 0.08), u(0, 2 * np.pi)),
        ),
        infarct_angle=u(0, 2 * np.pi),
        rv_angle=rv_angle,
        rv_span=u(0.9, 1.15) + (0.15 if group == "RV" else 0),
        rv_skew=u(-0.35, 0.35),
        fat_around_heart=(u(1, 3) + 0.06 * (weight - 50), u(0.2, 1), rv_angle + u(-1.2, 1.2)),
        body_centre=body_centre,
        body_radii=body_radii,
        wall_layers=(fat, u(7, 14)),
        rib_phase=u(0, 2 * np.pi),
        diaphragm=(epi_radius + u(-3, 18), u(0.1, 0.4), u(-0.3, 0.25), u(0, 0.004)),
        abdomen=tuple(_draw_abdomen(rng)),
        lung_vessels=tuple(_draw_lung_vessels(rng, epi_radius)),
        thorax=tuple(_draw_thorax(rng, epi_radius)),
        basal=tuple(_draw_basal(rng, epi_radius, rv_angle)),
        warp=np.stack(
            [_wave(rng, wavelength, amplitude) for wavelength, amplitude in ((90, 5), (70, 4), (45, 2.5), (28, 1.2))]
        ),
        **_draw_appearance(rng),
    )


def _draw_ventricles(rng: np.random.Generator, group: str) -> dict[str, Ventricles]:
    """Both phases; the ES cavity is always the smaller one."""
    u = rng.uniform
    #         LV radius, wall, radius ES/ED, RV width, RV width ES/ED
    ranges = {
        "NOR": ((20, 26), (6.5, 9.5), (0.60, 0.72), (20, 30), (0.60, 0.78)),
        "DCM": ((27, 34), (5.5, 8.0), (0.83, 0.93), (18, 34), (0.70, 0.88)),
        "HCM": ((18, 23), (11, 16), (0.48, 0.62), (15, 26), (0.55, 0.75)),
        "MINF": ((23, 31), (6.0, 9.5), (0.76, 0.88), (18, 28), (0.60, 0.80)),
        "RV": ((18, 24), (6.5, 9.5), (0.62, 0.76), (34, 46), (0.80, 0.92)),
    }
    radius, wall, shrink, rv_width, rv_shrink = (u(*pair) for pair in ranges[group])
    length = u(58, 72) + 0.6 * (radius - 22)
    shortening = u(4, 8) if group in ("DCM", "MINF") else u(8, 14)
    infarct = u(0.35, 0.55) if group == "MINF" else 0.0
    rv_base, rv_taper = u(-6, 7), u(0.72, 0.95)
    papillary = tuple(
        Blob(
            Tissue.PAPILLARY,
            (u(0.5, 0.72) * np.cos(angle), u(0.5, 0.72) * np.sin(angle), u(0.4, 0.6)),
            (u(0.12, 0.2), u(0.1, 0.17), u(0.25, 0.4)),
            angle,
        )
        for angle in (u(0, 1.2) + np.array([0.3, 2.2, 4.2]))[: rng.integers(2, 4)]
    )
    phases = {}
    for phase in PHASES:
        es = phase == "ES"
        r = radius * shrink if es else radius
        # the wall keeps its cross-section, and thickens a little beyond that as the heart shortens
        w = np.sqrt(r**2 + 1.08 * ((radius + wall) ** 2 - radius**2)) - r if es else wall
        base = shortening if es else 0.0
        phases[phase] = Ventricles(
            base=base,
            endo_length=length - base - (0.35 * w if es else 0),
            epi_length=length - base + 0.8 * w,
            endo_radius=r,
            wall=w,
            infarct=infarct,
            rv_base=rv_base + 1.2 * base,
            rv_length=rv_taper * (length + wall) - rv_base - 1.3 * base,
            rv_width=rv_width * rv_shrink if es else rv_width,
            papillary=papillary,
        )
    return phases


def _draw_abdomen(rng: np.random.Generator) -> Iterator[Blob]:
    """Liver with its vessels, spleen and bowel, which is round and walled like a ventricle."""
    u = rng.uniform
    liver = (u(-75, -35), u(65, 95), u(20, 60))
    radii = (u(45, 80), u(32, 52), u(60, 120))
    yield Blob(Tissue.LIVER, liver, radii, u(-0.5, 0.5))
    for _ in range(rng.integers(3, 8)):
        x, y, z = (c + r * u(-0.7, 0.7) for c, r in zip(liver, radii, strict=True))
        yield Blob(Tissue.VESSEL, (x, y, z), (u(2, 6), u(1.5, 3.5), u(8, 30)), u(0, np.pi))
    yield Blob(
        Tissue.SPLEEN,
        (u(50, 90), u(60, 90), u(10, 60)),
        (u(14, 24), u(22, 38), u(25, 60)),
        u(-0.6, 0.6),
    )
    for _ in range(rng.integers(10, 22)):
        centre = (u(-45, 85), u(30, 105), u(-10, 90))
        radii = (u(8, 24), u(7, 17), u(12, 45))
        angle, shell = u(0, np.pi), u(2, 5)
        content = (Tissue.BOWEL_BRIGHT, Tissue.BOWEL_DARK, Tissue.BOWEL_WALL)[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
        yield Blob(Tissue.BOWEL_WALL, centre, radii, angle)
        yield Blob(content, centre, (radii[0] - shell, radii[1] - shell, radii[2] - shell), angle)


def _draw_thorax(rng: np.random.Generator, epi_radius: float) -> Iterator[Blob]:
    """Mediastinum, spine, descending aorta and oesophagus."""
    u = rng.uniform
    back = epi_radius + u(30, 48)
    side = u(-30, 10)
    yield Blob(Tissue.FAT, (side + u(-5, 5), 0.75 * back, -10), (u(22, 36), u(18, 30), 1e3), u(-0.5, 0.5))
    yield Blob(Tissue.MUSCLE, (side - 8, back + 18, 0), (u(34, 46), u(22, 30), 1e3))
    yield Blob(Tissue.BONE, (side - 4, back + 8, 0), (u(15, 20), u(13, 17), 1e3))
    yield Blob(Tissue.CORD, (side - 4, back + 30, 0), (u(6, 9), u(5, 7), 1e3))
    aorta = (side + u(10, 24), back - u(6, 14), 0.0)
    radius = u(9, 14)
    yield Blob(Tissue.MUSCLE, aorta, (radius + 1.5, radius + 1.5, 1e3))
    yield Blob(Tissue.VESSEL, aorta, (radius, radius * u(0.85, 1.0), 1e3), u(0, np.pi))
    oesophagus = (aorta[0] - u(10, 20), aorta[1] - u(4, 12), 0.0)
    yield Blob(Tissue.MUSCLE, oesophagus, (u(5, 8), u(4, 6), 1e3), u(0, np.pi))


def _draw_lung_vessels(rng: np.random.Generator, epi_radius: float) -> Iterator[Blob]:
    u = rng.uniform
    for _ in range(rng.integers(30, 90)):
        distance, angle = u(epi_radius + 4, 110), u(0, 2 * np.pi)
        centre = (distance * np.cos(angle), distance * np.sin(angle), u(-20, 90))
        yield Blob(Tissue.VESSEL, centre, (u(1, 4.5), u(0.8, 2.2), u(5, 25)), u(0, np.pi))


def _draw_basal(rng: np.random.Generator, epi_radius: float, rv_angle: float) -> Iterator[Blob]:
    """Atria and great vessels: blood without a label, just above the ventricles."""
    u = rng.uniform
    direction = np.array([np.cos(rv_angle), np.sin(rv_angle)])
    yield Blob(
        Tissue.FAT,
        (*(0.5 * epi_radius * direction), -15),
        (1.35 * epi_radius, 1.15 * epi_radius, 60),
        rv_angle,
    )
    for along, across, size in (
        (1.2, u(-0.3, 0.5), 0.55),
        (0.0, u(-0.3, 0.3), 0.7),
        (0.6, u(-0.6, -0.2), 0.4),
    ):
        centre = epi_radius * (along * direction + across * np.array([-direction[1], direction[0]]))
        r = epi_radius * size * u(0.85, 1.15)
        yield Blob(Tissue.RV_WALL, (*centre, -15), (r + 2, 0.85 * r + 2, 80), u(0, np.pi))
        yield Blob(Tissue.ATRIUM, (*centre, -15), (r, 0.85 * r, 80), u(0, np.pi))


def _wave(rng: np.random.Generator, wavelength: float, amplitude: float) -> np.ndarray:
    """One plane wave of the smooth warp that makes the ellipsoids of the body organic."""
    angle, k = rng.uniform(0, 2 * np.pi), 2 * np.pi / wavelength
    return np.array(
        [k * np.cos(angle), k * np.sin(angle), rng.normal(0, 0.3 * k), rng.uniform(0, 2 * np.pi)]
        + list(rng.normal(0, amplitude / np.sqrt(2), 2))
    )


def _draw_appearance(rng: np.random.Generator) -> dict:
    """Contrast of the tissues and the scanner's artefacts, as keyword arguments of `Anatomy`."""
    u = rng.uniform
    blood = u(0.7, 1.0)
    myocardium = u(0.22, blood - 0.27)  # always darker than the blood by what an eye needs
    fat = u(0.3, 1.2)
    bowel = u(0.5, 1.1)
    contrast = np.zeros(len(Tissue))
    for tissue, value in {
        Tissue.AIR: 0.015,
        Tissue.LUNG: u(0.03, 0.16),
        Tissue.FAT: fat,
        Tissue.MUSCLE: myocardium * u(0.6, 1.15),
        Tissue.BONE: u(0.2, 0.7),
        Tissue.LIVER: u(0.15, 0.75),
        Tissue.SPLEEN: u(0.3, 0.9),
        Tissue.BOWEL_WALL: myocardium * u(0.7, 1.3),
        Tissue.BOWEL_BRIGHT: bowel,
        Tissue.BOWEL_DARK: u(0.03, 0.4),
        Tissue.CORD: u(0.5, 1.1),
        Tissue.VESSEL: blood * u(0.75, 1.15),
        Tissue.ATRIUM: blood * u(0.75, 1.1),
        Tissue.PERICARDIAL_FAT: fat * u(0.75, 1.0),
        Tissue.RV_WALL: myocardium * u(0.9, 1.2),
        Tissue.RV_BLOOD: (rv_blood := max(blood * u(0.75, 1.08), myocardium + 0.2)),
        Tissue.RV_TRABECULA: 0.5 * (rv_blood + myocardium),
        Tissue.MYOCARDIUM: myocardium,
        Tissue.LV_BLOOD: blood,
        Tissue.PAPILLARY: myocardium * u(0.95, 1.25),
    }.items():
        contrast[tissue] = value
    texture = contrast * 0.07
    for tissue, relative in (
        (Tissue.LIVER, 0.12),
        (Tissue.SPLEEN, 0.12),
        (Tissue.BOWEL_BRIGHT, 0.3),
        (Tissue.BOWEL_DARK, 0.4),
        (Tissue.FAT, 0.12),
        (Tissue.PERICARDIAL_FAT, 0.2),
        (Tissue.LUNG, 0.35),
        (Tissue.ATRIUM, 0.2),
        (Tissue.RV_BLOOD, 0.1),
        (Tissue.AIR, 0.0),
    ):
        texture[tissue] = relative * contrast[tissue]
    direction, strength = u(0, 2 * np.pi), u(0.1, 0.75)
    bias = np.array([strength * np.cos(direction), strength * np.sin(direction), *rng.normal(0, 0.15, 3)])
    return dict(
        contrast=contrast,
        texture=texture,
        gamma=u(0.75, 1.25),
        noise=np.exp(u(np.log(0.008), np.log(0.06))),
        bias=bias,
        ghost=(int(rng.integers(2)), u(0, 0.07), int(rng.integers(18, 45))),
        blur=u(0.3, 0.65),
        scale=u(180, 1400),
    )


# -------------------------------------------------------------------------------------- rasterising


def rasterise(anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Tissue at every sub-voxel of the patient's grid, in both phases; only the heart differs.

    Returns:
      For "ED" and "ES", (Z, sz, X * sx, Y * sy) uint8 of `Tissue`, with (sz, sx, sy) of `SUBSAMPLES`.
    """
    sz, sx, sy = SUBSAMPLES
    columns, rows, slices = anatomy.shape
    dx, dy, dz = anatomy.spacing
    across = ((np.arange(columns * sx) + 0.5) / sx - columns / 2).astype(np.float32) * np.float32(dx)
    down = ((np.arange(rows * sy) + 0.5) / sy - rows / 2).astype(np.float32) * np.float32(dy)
    within = ((np.arange(sz) + 0.5) / sz - 0.5) * dz
    cos, sin = np.float32(np.cos(anatomy.rotation)), np.float32(np.sin(anatomy.rotation))

    tissue = {phase: np.empty((slices, sz, columns * sx, rows * sy), np.uint8) for phase in PHASES}
    for k in range(slices):
        a = across[:, None] - np.float32(anatomy.shift[0] + anatomy.slice_shift[k, 0])
        b = down[None, :] - np.float32(anatomy.shift[1] + anatomy.slice_shift[k, 1])
        x, y = cos * a + sin * b, cos * b - sin * a
        for j in range(sz):
            z = float(anatomy.first_slice + k * dz + within[j])
            body = _body(anatomy, x, y, z)
            for phase in PHASES:
                tissue[phase][k, j] = body
                _paint_heart(tissue[phase][k, j], anatomy, anatomy.ventricles[phase], x, y, z)
    return tissue


def _inside(blob: Blob, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray | None:
    """Mask of an ellipsoid in one plane; None where the plane misses it."""
    left = 1 - ((z - blob.centre[2]) / blob.radii[2]) ** 2
    if left <= 0:
        return None
    cos, sin = np.float32(np.cos(blob.angle)), np.float32(np.sin(blob.angle))
    dx, dy = x - np.float32(blob.centre[0]), y - np.float32(blob.centre[1])
    u = (cos * dx + sin * dy) * np.float32(1 / blob.radii[0])
    v = (cos * dy - sin * dx) * np.float32(1 / blob.radii[1])
    return u * u + v * v < np.float32(left)


def _near(blob: Blob, x: np.ndarray, y: np.ndarray) -> tuple[slice, slice]:
    """A window that holds the ellipsoid, found on every fourth point: most organs are small."""
    reach = max(blob.radii[:2]) + 12  # mm; the margin covers the points skipped
    close = np.abs(x[::4, ::4] - np.float32(blob.centre[0])) < reach
    close &= np.abs(y[::4, ::4] - np.float32(blob.centre[1])) < reach
    window = []
    for axis in (1, 0):
        hits = np.flatnonzero(close.any(axis=axis))
        window.append(slice(4 * hits[0], 4 * hits[-1] + 4) if hits.size else slice(0, 0))
    return window[0], window[1]


def _paint(
    tissue: np.ndarray,
    blob: Blob,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    where: np.ndarray | None = None,
) -> None:
    """Fills one ellipsoid in one plane, in place; only inside the mask `where`, if given."""
    if abs(z - blob.centre[2]) >= blob.radii[2]:
        return
    window = _near(blob, x, y)
    mask = _inside(blob, x[window], y[window], z)
    if mask is not None:
        tissue[window][mask if where is None else mask & where[window]] = blob.tissue


def _body(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, z: float) -> np.ndarray:
    """Everything but the heart, in one plane; later organs cover earlier ones."""
    warped_x, warped_y = x.copy(), y.copy()
    for kx, ky, kz, start, shift_x, shift_y in anatomy.warp.astype(np.float32):
        wave = np.sin(kx * x + ky * y + np.float32(kz * z + start))
        warped_x += shift_x * wave
        warped_y += shift_y * wave
    x, y = warped_x, warped_y

    u = (x - np.float32(anatomy.body_centre[0])) / np.float32(anatomy.body_radii[0])
    v = (y - np.float32(anatomy.body_centre[1])) / np.float32(anatomy.body_radii[1])
    # depth under the skin in mm: exact on the outline, good enough in the wall
    depth = (1 - np.sqrt(u * u + v * v)) * np.float32(np.mean(anatomy.body_radii))
    fat, muscle = anatomy.wall_layers
    tissue = np.full(x.shape, Tissue.AIR, np.uint8)
    tissue[depth > 0] = Tissue.MUSCLE  # skin
    tissue[depth > 1.5] = Tissue.FAT
    wall = depth > fat
    tissue[wall] = Tissue.MUSCLE
    ribs = np.sin(9 * np.arctan2(v, u) + np.float32(anatomy.rib_phase + 0.12 * z)) > 0.5
    tissue[wall & ribs & (np.abs(depth - (fat + 0.6 * muscle)) < 0.3 * muscle)] = Tissue.BONE
    cavity = depth > fat + muscle
    tissue[cavity] = Tissue.LUNG

    height, rise, slope, curvature = (np.float32(value) for value in anatomy.diaphragm)
    below = y - (height - rise * np.float32(max(z, 0)) + slope * x + curvature * x * x)
    tissue[cavity & (below > 0)] = Tissue.MUSCLE
    abdomen = cavity & (below > 3)
    tissue[abdomen] = Tissue.FAT
    for blob in anatomy.abdomen:
        _paint(tissue, blob, x, y, z, where=abdomen)
    lung = cavity & (below < 0)
    for blob in anatomy.lung_vessels:
        _paint(tissue, blob, x, y, z, where=lung)
    for blob in anatomy.thorax:
        _paint(tissue, blob, x, y, z)
    return tissue


def _waves(angle: np.ndarray, waves: tuple[tuple[int, float, float], ...]) -> np.ndarray:
    """1 + the sum of cosines; every wave is (order, amplitude, phase)."""
    terms = (amplitude * np.cos(order * (angle - phase)) for order, amplitude, phase in waves)
    return sum(terms, np.ones_like(angle))


def _taper(z: float, length: float, profile: float) -> float:
    """Radius at depth z over that at the base: a blunt half ellipsoid, 0 beyond its tip."""
    return float(np.sqrt(max(0.0, 1 - (max(z, 0.0) / length) ** profile)))


def _paint_heart(
    tissue: np.ndarray, anatomy: Anatomy, heart: Ventricles, x: np.ndarray, y: np.ndarray, z: float
) -> None:
    """Draws the heart of one phase over one plane of the body, in place."""
    x, y = x - np.float32(anatomy.lean[0] * z), y - np.float32(anatomy.lean[1] * z)
    if z < max(heart.base, heart.rv_base):
        for blob in anatomy.basal:
            _paint(tissue, blob, x, y, z)

    # radii in this plane: above the base those of the base, 0 beyond the apex
    endo = heart.endo_radius * _taper(z - heart.base, heart.endo_length, anatomy.profile)
    epi = (heart.endo_radius + heart.wall) * _taper(z - heart.base, heart.epi_length, anatomy.profile)
    rv = _taper(z - heart.rv_base, heart.rv_length, anatomy.profile) if z >= heart.rv_base else 0.0
    width = heart.rv_width * rv
    has_lv, has_rv = z >= heart.base and epi > 0, width > 2
    if not (has_lv or has_rv):
        return

    # both outlines of the LV, and the fat around it, as tables over the angle
    angle = np.linspace(-np.pi, np.pi, ANGLES, endpoint=False)
    sector = np.exp(2.5 * (np.cos(angle - anatomy.infarct_angle) - 1))
    wall = (epi - endo) * _waves(angle, anatomy.wall_waves) * (1 - heart.infarct * sector)
    endo_edge = endo * _waves(angle, anatomy.endo_waves)
    # never thinner than the grid can show, so that the cavity stays enclosed
    epi_edge = endo_edge + np.maximum(wall, min(4.5, epi))
    mean_fat, uneven, fat_angle = anatomy.fat_around_heart
    pad = mean_fat * (1 + uneven * np.cos(angle - fat_angle))

    towards_rv = np.array([np.cos(anatomy.rv_angle), np.sin(anatomy.rv_angle)])
    extent = epi_edge.max() + 0.5 * width + pad.max()
    window = _near(Blob(Tissue.FAT, (*(0.5 * width * towards_rv), z), (extent, extent, 1)), x, y)
    tissue, x, y = tissue[window], x[window], y[window]
    distance = np.hypot(x, y)
    bin_of = ((np.arctan2(y, x) + np.float32(np.pi)) * np.float32(ANGLES / (2 * np.pi))).astype(np.int32) % ANGLES
    endo_edge, epi_edge, pad = (table.astype(np.float32)[bin_of] for table in (endo_edge, epi_edge, pad))

    outside = distance > epi_edge
    if has_lv:
        tissue[distance < epi_edge + pad] = Tissue.PERICARDIAL_FAT
    if has_rv:
        # an ellipse reaching `width` beyond the septum; what the LV leaves of it is the crescent
        full = max(epi, 0.5 * (heart.endo_radius + heart.wall))
        radial = 0.5 * (full + width)
        tangential = min(anatomy.rv_span * full, 2.2 * radial) * (0.55 + 0.45 * rv)
        cos, sin = towards_rv.astype(np.float32)
        along, beside = cos * x + sin * y, cos * y - sin * x
        along += np.float32(radial - full - width) + np.float32(0.5 * anatomy.rv_skew / full) * beside * np.abs(beside)
        reach = np.hypot(along * np.float32(1 / radial), beside * np.float32(1 / tangential))
        depth = (1 - reach) * np.float32(0.5 * (radial + tangential))
        tissue[(depth > -3 - pad) & outside] = Tissue.PERICARDIAL_FAT
        tissue[(depth > -3) & outside] = Tissue.RV_WALL
        cavity = (depth > 0) & outside
        tissue[cavity] = Tissue.RV_BLOOD
        # trabeculae of the free wall, denser towards the apex
        mesh = np.sin(0.9 * x + np.float32(0.2 * z)) * np.sin(0.8 * y - np.float32(0.15 * z))
        tissue[cavity & (depth < 7) & (mesh > 0.35 + 0.5 * rv)] = Tissue.RV_TRABECULA
    if has_lv:
        tissue[~outside] = Tissue.MYOCARDIUM
        cavity = distance < endo_edge
        tissue[cavity] = Tissue.LV_BLOOD
        for blob in heart.papillary if endo > 0 else ():
            mask = _inside(
                blob,
                x / np.float32(endo),
                y / np.float32(endo),
                (z - heart.base) / heart.endo_length,
            )
            if mask is not None:
                tissue[mask & cavity] = Tissue.PAPILLARY


# ------------------------------------------------------------------------------------------ imaging


def _block_sum(values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Sum over the sub-voxels: (Z, sz, X * sx, Y * sy) -> (X, Y, Z), in the type of `values`."""
    sx, sy = values.shape[2] // shape[0], values.shape[3] // shape[1]
    total = functools.reduce(np.add, (values[:, j] for j in range(values.shape[1])))
    total = functools.reduce(np.add, (total[:, j::sx] for j in range(sx)))
    total = functools.reduce(np.add, (total[:, :, j::sy] for j in range(sy)))
    return np.ascontiguousarray(total.transpose(1, 2, 0))


def to_label(tissue: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Label of most sub-voxels: (X, Y, Z) uint8 in 0..3; a tie goes to the lower label."""
    labels = LABEL_OF_TISSUE[tissue]
    votes = np.stack([_block_sum((labels == k).astype(np.uint16), shape) for k in range(4)])
    return votes.argmax(axis=0).astype(np.uint8)


def to_mr(rng: np.random.Generator, anatomy: Anatomy, tissue: np.ndarray) -> np.ndarray:
    """MR image (X, Y, Z) of a rasterised anatomy in the patient's dtype; whole numbers >= 0."""
    shape = anatomy.shape
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (4, 4, 0.6))
    fine = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (1.3, 1.3, 0))
    field = 0.8 * smooth / smooth.std() + 0.6 * fine / fine.std()
    # partial volume: signal is averaged over the sub-voxels of each voxel
    parts = np.float32(np.prod(tissue.shape) / np.prod(shape))
    image = _block_sum(anatomy.contrast.astype(np.float32)[tissue], shape) / parts
    image += _block_sum(anatomy.texture.astype(np.float32)[tissue], shape) / parts * field
    image = ndimage.gaussian_filter(np.maximum(image, 0), (anatomy.blur, anatomy.blur, 0))

    x, y = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape[:2])
    x, y = x[:, None, None], y[None, :, None]
    gain = sum(c * t for c, t in zip(anatomy.bias.astype(np.float32), (x, y, x * x, y * y, x * y), strict=True))
    image *= np.exp(gain) * (1 + 0.05 * rng.standard_normal((1, 1, shape[2]), np.float32))
    axis, strength, shift = anatomy.ghost
    image += np.float32(strength) * np.roll(image, shift, axis)

    real = image + np.float32(anatomy.noise) * rng.standard_normal(shape, np.float32)
    imaginary = np.float32(anatomy.noise) * rng.standard_normal(shape, np.float32)
    magnitude = np.hypot(real, imaginary) ** np.float32(anatomy.gamma)
    if anatomy.dtype == "float32":  # as in ACDC: such files hold 0..255
        return np.round(np.minimum(255 * magnitude / np.percentile(magnitude, 99.7), 255)).astype(np.float32)
    return np.round(np.minimum(anatomy.scale * magnitude, 32767)).astype(np.int16)


# ------------------------------------------------------------------------------------------ writing


def write_patient(root: Path, seed: int, number: int) -> str:
    """Writes patient `number` (from 1) under `root`/training and returns its id.

    The files are a function of (seed, number) alone.
    """
    rng = np.random.default_rng([seed, number])
    anatomy = draw_patient(rng, GROUPS[(number - 1) % len(GROUPS)])
    patient = f"patient{number:03d}"
    folder = root / "training" / patient
    folder.mkdir(parents=True)
    for (_, tissue), frame in zip(rasterise(anatomy).items(), (1, anatomy.es_frame), strict=True):
        name = f"{patient}_frame{frame:02d}"
        _write_nifti(folder / f"{name}.nii.gz", to_mr(rng, anatomy, tissue), anatomy.spacing)
        _write_nifti(folder / f"{name}_gt.nii.gz", to_label(tissue, anatomy.shape), anatomy.spacing)
    (folder / "Info.cfg").write_text(
        f"ED: 1\nES: {anatomy.es_frame}\nGroup: {anatomy.group}\nHeight: {anatomy.height:.1f}\n"
        f"NbFrame: {anatomy.frames}\nWeight: {anatomy.weight:.1f}\n"
    )
    return patient


def _write_nifti(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    image = nib.Nifti1Image(array, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    image.set_sform(image.affine, code="aligned")
    image.set_qform(image.affine, code="aligned")
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=5, mtime=0))  # no date: same bytes every time


def generate(output: Path, patients: int = 40, val: int = 6, test: int = 10, seed: int = 0, workers: int = 1) -> bool:
    """Writes a data set of `patients` training, `val` and `test` patients to `output`.

    Built in a temporary folder beside `output` and renamed at the end, so that `output` is whole or
    absent. The files do not depend on `workers` (processes; a script that asks for more than one
    needs the usual `if __name__ == "__main__"`).

    Returns:
      True if it was written, False if `output` already held the same data set.

    Raises:
      ValueError: a count or the seed is out of range.
      FileExistsError: `output` holds something else, or phantoms made with other parameters.
    """
    output = Path(output)
    counts = {"train": patients, "val": val, "test": test}
    for name, count, least in (
        ("patients", patients, 1),
        ("val", val, 0),
        ("test", test, 0),
        ("workers", workers, 1),
    ):
        if count < least:
            raise ValueError(f"{name}={count} is too small: give {least} or more")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: give 0 or more")
    if (total := sum(counts.values())) > 999:
        raise ValueError(f"{total} patients in all, but ids have three digits: ask for 999 or fewer")

    wanted = {"version": VERSION, "patients": patients, "val": val, "test": test, "seed": seed}
    record = output / "phantom.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if found == wanted:
            print(f"{output} already holds these phantoms; left as it is.")
            return False
        raise FileExistsError(f"{output} was made with {found}, not {wanted}: choose another folder or delete this one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not a phantom data set: choose another folder")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        root = Path(scratch) / output.name
        root.mkdir()
        ids = list(tqdm(_write_all(root, seed, total, workers), "drawing", total, unit=" patients", disable=None))
        splits, start = {}, 0
        for split, count in counts.items():
            splits[split] = ids[start : start + count]
            start += count
        (root / "splits.json").write_text(json.dumps(splits, indent=1) + "\n")
        (root / "phantom.json").write_text(json.dumps(wanted, indent=1) + "\n")
        os.replace(root, output)
    megabytes = sum(path.stat().st_size for path in output.rglob("*.nii.gz")) / 1e6
    print(
        f"Wrote {output}: {total} patients ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{2 * total} labelled volumes, {megabytes:.1f} MB."
    )
    return True


def _write_all(root: Path, seed: int, total: int, workers: int) -> Iterator[str]:
    """Writes patients 1..total and yields their ids in order."""
    numbers = range(1, total + 1)
    if min(workers, total) == 1:
        for number in numbers:
            yield write_patient(root, seed, number)
        return
    # spawn, not fork: the caller may already run threads (JAX does)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, total), mp_context=context) as pool:
        yield from pool.map(write_patient, [root] * total, [seed] * total, numbers)


def main(arguments: list[str] | None = None) -> None:
    """Command line; exits with status 1 and one line on an error."""
    parser = cli.make_parser("data_prep.phantom", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not hold anything else")
    parser.add_argument("--patients", type=int, default=40, help="training patients (default 40)")
    parser.add_argument("--val", type=int, default=6, help="validation patients (default 6)")
    parser.add_argument("--test", type=int, default=10, help="test patients (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    options = cli.parse(parser, arguments)
    try:
        generate(**vars(options))
    except (ValueError, OSError) as error:  # not by `common.run`: that would load much into every worker
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
