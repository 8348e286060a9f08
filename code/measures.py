"""A digit classifier and, from its features, the usual measures of generated images.

The networks of the original measures were trained on photographs; here a classifier of digits
takes their place. So the measures rank models of digits, and only those that the same classifier
has seen: each machine trains its own, and each run records the sha256 of its weights.
"""

import hashlib
import math
import time
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.common import Loader
from files import write_json
from runs import hardware, has_fast_bf16, save_tensors, seed_all

N_CLASSES, N_FEATURES = 10, 128
SEED, EPOCHS = 42, 6  # for training the classifier, whatever the arguments of the run are
NEIGHBOURS = 5  # k of the k-nearest-neighbour balls
ROWS = 1000  # images per batch in the classifier, and rows per block of a distance matrix


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of Gaussians fitted to features (N, D), (M, D).

    Heusel et al., NeurIPS 2017, equation 6. Needs two rows each; NaN if a feature is not finite.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    a, b = a.cpu().double(), b.cpu().double()  # not every accelerator has float64 and eigh
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # With R² = Σ_a, the symmetric matrix R Σ_b R has the eigenvalues of Σ_a Σ_b.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def inception_score(log_probs: Tensor) -> float:
    """exp E_x KL(p(y|x) ‖ p(y)), from 1 to the number of classes, given log p(y|x) (N, classes).

    Salimans et al., NeurIPS 2016, section 4, with the marginal p(y) taken over the whole set.
    """
    log_probs = log_probs.cpu().double()
    log_marginal = log_probs.logsumexp(0) - math.log(len(log_probs))
    return float((log_probs.exp() * (log_probs - log_marginal)).sum(1).mean().exp())


def class_shares(classes: Tensor) -> Tensor:
    """The share of each class, (10,), among class numbers (N,)."""
    return classes.cpu().bincount(minlength=N_CLASSES).double() / len(classes)


def categorical_kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) = Σ_i p_i log p_i / q_i in nats between two categorical distributions (K,)."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) between rows (N, D) and (M, D), exactly 0 between equal rows."""
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')


def neighbour_radii(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The distance (N,) from each row of (N, D) to its k-th nearest neighbour among the others."""
    return torch.cat([distances(rows, features).kthvalue(k + 1).values  # the row itself is first
                      for rows in features.split(ROWS)])


def manifold_measures(real: Tensor, fake: Tensor, k: int = NEIGHBOURS,
                      real_radii: Tensor | None = None) -> dict[str, float]:
    """Precision, recall, density and coverage from k-nearest-neighbour balls around each row.

    Precision is the share of fake rows inside some real ball, recall the share of real rows inside
    some fake ball (Kynkäänniemi et al., NeurIPS 2019, equations 1 and 2). Density is the mean
    number of real balls around a fake row, divided by k; coverage is the share of real balls with
    a fake row inside (Naeem et al., ICML 2020, section 3). More than k rows (N, D), (M, D) each.
    `real_radii` is `neighbour_radii(real, k)`, for whoever has it already.
    """
    real_radii = neighbour_radii(real, k) if real_radii is None else real_radii
    fake_radii = neighbour_radii(fake, k)
    real_balls = recalled = covered = 0  # `real_balls` becomes a tensor, a count for each fake row
    for rows, radii in zip(real.split(ROWS), real_radii.split(ROWS), strict=True):
        to_fake = distances(rows, fake)
        in_real_ball = to_fake <= radii[:, None]
        real_balls += in_real_ball.sum(0)
        recalled += int((to_fake <= fake_radii).any(1).sum())
        covered += int(in_real_ball.any(1).sum())
    return {'precision': float((real_balls > 0).float().mean()), 'recall': recalled / len(real),
            'density': float(real_balls.float().mean()) / k, 'coverage': covered / len(real)}


class DigitClassifier(nn.Module):
    """Three convolutions, 128 features and ten classes, instead of a network for photographs."""

    def __init__(self):
        super().__init__()
        def block(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.SiLU())
        self.net = nn.Sequential(
            block(1, 32, 5, stride=2), block(32, 64, 3), nn.MaxPool2d(2), block(64, 64, 3),
            nn.Flatten(), nn.Linear(64 * 7 * 7, N_FEATURES), nn.SiLU())
        self.head = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 128) and logits (B, 10) in float32 from images (B, 784) in [0, 1]."""
        features = self.net(2 * images.view(-1, 1, 28, 28) - 1)
        return features.float(), self.head(F.dropout(features, 0.3, self.training)).float()

    @torch.no_grad()
    def look_at(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128) and log p(y|x) (N, 10) of images (N, 784), rounded to 8 bits."""
        outputs = [self((255 * rows).round() / 255) for rows in images.split(ROWS)]
        features, logits = map(torch.cat, zip(*outputs, strict=True))
        return features, logits.log_softmax(1)


def train_classifier(train: Loader, epochs: int = EPOCHS) -> DigitClassifier:
    """The classifier, trained on images from 0 to 255 and their labels in batches of 250."""
    device, bf16 = train.images.device, has_fast_bf16(train.images.device)
    seed_all(SEED, 'classifier')
    train = Loader(train.images, train.labels, 250, shuffle=True, source=train.source)
    model = DigitClassifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(train))
    for _ in range(epochs):
        for images, labels in train:
            shift = torch.randint(-2, 3, (2,)).tolist()  # stays within the margin of the digits
            images = (images / 255).view(-1, 28, 28).roll(shift, (1, 2))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(images)[1], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fingerprint(model: nn.Module) -> str:
    """The sha256 of a model's weights, which distinguishes one classifier from another."""
    weights = [weight.cpu().numpy().tobytes() for weight in model.state_dict().values()]
    return hashlib.sha256(b''.join(weights)).hexdigest()


def load_classifier(results: Path, train: Loader, val: Loader) -> DigitClassifier:
    """The classifier saved in the results, retrained if missing, damaged or for other images."""
    folder = results / f'classifier{"_digits" * (train.source["dataset"] == "digits")}'
    path, device = folder / 'checkpoint.pt', train.images.device
    made_from = dict(train.source['sha256'], images=len(train.images), epochs=EPOCHS, seed=SEED)
    if path.exists():
        model = DigitClassifier().to(device, memory_format=torch.channels_last)
        try:
            saved = torch.load(path, map_location='cpu', weights_only=True)
            if saved['made_from'] == made_from:
                model.load_state_dict(saved['model'])
                return model.eval()
        except Exception:  # noqa: BLE001 - what torch raises depends on which byte is damaged
            print(f'{path} cannot be loaded and will be replaced')
    print(f'{folder}: training the digit classifier, about a minute', flush=True)
    for leftover in folder.glob('*.tmp'):  # from a process that was killed while writing
        leftover.unlink(missing_ok=True)
    start = time.perf_counter()
    model = train_classifier(train)
    minutes = round((time.perf_counter() - start) / 60, 6)
    hits = model.look_at(val.images / 255)[1].argmax(1) == val.labels
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'config.json', dict(script='measures', made_from=made_from,
                                            sha256=fingerprint(model), hardware=hardware(device)))
    write_json(folder / 'metrics.json', {
        'val_accuracy': round(int(hits.sum()) / len(hits), 6), 'seed': SEED,
        'parameters': sum(p.numel() for p in model.parameters()), 'train_minutes': minutes})
    save_tensors(path, {'made_from': made_from, 'model': model.state_dict()})
    return model


class Judge:
    """A classifier, and real images (N, 784) with labels (N,) that others are compared with."""

    def __init__(self, classifier: DigitClassifier, images: Tensor, labels: Tensor):
        self.classifier, self.shares = classifier, class_shares(labels)
        self.features, _ = classifier.look_at(images)

    @cached_property
    def radii(self) -> Tensor:
        """The radii (N,) of the balls around the real images, computed once."""
        return neighbour_radii(self.features)

    def glance(self, images: Tensor) -> dict[str, float]:
        """The Fréchet distance and the smallest share of a class, for (M, 784) in [0, 1]."""
        features, log_probs = self.classifier.look_at(images)
        return {'frechet': frechet_distance(self.features, features),
                'class_share_min': float(class_shares(log_probs.argmax(1)).min())}

    def measure(self, images: Tensor) -> dict[str, float]:
        """Every measure of this module by its name in `metrics.json`, for (M, 784) in [0, 1]."""
        features, log_probs = self.classifier.look_at(images)
        shares = class_shares(log_probs.argmax(1))
        return {'frechet': frechet_distance(self.features, features),
                'inception_score': inception_score(log_probs),
                'class_share_min': float(shares.min()), 'class_share_max': float(shares.max()),
                'class_kl': categorical_kl(shares, self.shares),
                **manifold_measures(self.features, features, real_radii=self.radii)}
