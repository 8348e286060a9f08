"""How good are generated digits? A digit classifier and, from its features, the usual measures.

All compare a set of generated images with a set of real ones: the Fréchet distance, the inception
score, the shares of the classes, and precision, recall, density and coverage. The networks of the
original measures were trained on photographs; here a small convolutional classifier of digits
takes their place. So the measures rank models of digits, against each other and against real
images measured alike, and only where one and the same classifier saw all: each machine trains its
own, and a run names the one that judged it by its fingerprint.
"""

import hashlib
import io
import json
import math
import pickle
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.common import Loader
from runs import hardware, has_fast_bf16, seed_all, write_atomic

N_CLASSES = 10
N_FEATURES = 128
SEED, EPOCHS = 42, 6  # of the classifier, whatever the run's: one recipe for all
NEIGHBOURS = 5  # k of the manifolds, for all four measures
ROWS = 1000  # at once through the classifier, and in a block of distances


# --- measures of two sets ------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of Gaussians fitted to two sets of features.

    The squared distance, as it is always reported: Heusel et al., GANs Trained by a Two Time-Scale
    Update Rule Converge to a Local Nash Equilibrium (NeurIPS 2017), equation 6.
    Shapes: (N, D) and (M, D), at least two rows each. NaN where a feature is not finite.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    a, b = a.cpu().double(), b.cpu().double()  # not every accelerator has either
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # Σ_a Σ_b has the eigenvalues of R Σ_b R with R² = Σ_a, which is symmetric and so well behaved.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


def inception_score(log_probs: Tensor) -> float:
    """exp E_x KL(p(y|x) ‖ p(y)): 1 if no image tells its class, the number of classes at most.

    Salimans et al., Improved Techniques for Training GANs (NeurIPS 2016), section 4, with the
    marginal p(y) over the whole set. Shape: (N, classes), log p(y|x).
    """
    log_probs = log_probs.cpu().double()
    log_marginal = log_probs.logsumexp(0) - math.log(len(log_probs))
    return float((log_probs.exp() * (log_probs - log_marginal)).sum(1).mean().exp())


def class_shares(classes: Tensor) -> Tensor:
    """The share of each class, (10,). Shape: (N,), class numbers."""
    return classes.cpu().bincount(minlength=N_CLASSES).double() / len(classes)


def categorical_kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) = Σ_i p_i log p_i / q_i in nats, of two categorical distributions, each (K,)."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())


def neighbour_radii(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The distance of each row to its k-th nearest neighbour among the others: (N, D) to (N,)."""
    # k + 1, since each row is at distance 0 from itself.
    return torch.cat([distances(rows, features).kthvalue(k + 1, dim=1).values
                      for rows in features.split(ROWS)])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances, exactly 0 between equal rows: (N, D), (M, D) to (N, M)."""
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')


def manifold_measures(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage from k-nearest-neighbour balls around each row.

    Precision is the share of fake rows inside some real ball, recall the share of real rows
    inside some fake ball (Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing
    Generative Models, NeurIPS 2019, equations 1 and 2, there with k = 3). Density counts the real
    balls around each fake row, in units of k; coverage is the share of real balls with a fake row
    in them (Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models,
    ICML 2020, section 3). Shapes: (N, D) and (M, D), more than k rows each.
    """
    real_radii, fake_radii = neighbour_radii(real, k), neighbour_radii(fake, k)
    fake_hits = torch.zeros(len(fake), device=real.device)  # real balls that hold it
    recalled, covered = 0, 0
    for rows, radii in zip(real.split(ROWS), real_radii.split(ROWS), strict=True):
        to_fake = distances(rows, fake)
        in_real_ball = to_fake <= radii[:, None]
        fake_hits += in_real_ball.sum(0)
        recalled += int((to_fake <= fake_radii).any(1).sum())
        covered += int(in_real_ball.any(1).sum())
    return {'precision': float((fake_hits > 0).float().mean()), 'recall': recalled / len(real),
            'density': float(fake_hits.mean()) / k, 'coverage': covered / len(real)}


# --- the classifier ------------------------------------------------------------------------------


class DigitClassifier(nn.Module):
    """Three convolutions, 128 features and ten classes."""

    def __init__(self):
        super().__init__()
        def block(c_in: int, c_out: int, size: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False),
                nn.BatchNorm2d(c_out), nn.SiLU())
        self.net = nn.Sequential(
            block(1, 32, 5, stride=2), block(32, 64, 3, stride=1), nn.MaxPool2d(2),
            block(64, 64, 3, stride=1), nn.Flatten(),
            nn.Linear(64 * 7 * 7, N_FEATURES), nn.SiLU())
        self.head = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 784) in [0, 1] to features (B, 128) and logits (B, 10), in float32."""
        features = self.net(2 * images.view(-1, 1, 28, 28) - 1)
        return features.float(), self.head(F.dropout(features, 0.3, self.training)).float()

    @torch.no_grad()
    def look_at(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 128), log p(y|x) (N, 10), of grey values rounded to 8 bits (N, 784)."""
        outputs = [self((255 * rows).round() / 255) for rows in images.split(ROWS)]
        return (torch.cat([features for features, _ in outputs]),
                torch.cat([logits for _, logits in outputs]).log_softmax(1))


def train_classifier(train: Loader, epochs: int = EPOCHS) -> DigitClassifier:
    """The classifier, trained on images 0 to 255 and their labels in batches of 250."""
    device, bf16 = train.images.device, has_fast_bf16(train.images.device)
    seed_all(SEED, 'classifier')
    train = Loader(train.images, train.labels, 250, shuffle=True, source=train.source)
    model = DigitClassifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(train))
    for _ in range(epochs):
        for images, labels in train:
            shift = torch.randint(-2, 3, (2,)).tolist()  # of the batch: digits have wide margins
            images = (images / 255).view(-1, 28, 28).roll(shift, (1, 2))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(images)[1]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fingerprint(model: nn.Module) -> str:
    """The sha256 of a model's weights, which tells one classifier from another."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_classifier(folder: Path, train: Loader, val: Loader) -> DigitClassifier:
    """The classifier kept in `folder`, or one trained now (about a minute) and kept there.

    Beside the weights, `metrics.json` says how well it does on the validation images. A file that
    is damaged, or of a classifier trained on other images, is replaced.
    """
    path = folder / 'checkpoint.pt'
    made_from = train.source['sha256'] | {'images': len(train.images), 'epochs': EPOCHS,
                                          'seed': SEED}
    damaged = ''
    model = DigitClassifier().to(train.images.device, memory_format=torch.channels_last)
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        if saved['made_from'] == made_from:
            model.load_state_dict(saved['model'])
            return model.eval()
    except FileNotFoundError:
        pass
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError,
            AttributeError):
        damaged = ' anew, since the file is damaged'
    print(f'{folder}: training the digit classifier{damaged}, about a minute', flush=True)
    for path_left in folder.glob('*.tmp'):  # by a process that was killed while writing
        path_left.unlink(missing_ok=True)
    start = time.perf_counter()
    model = train_classifier(train)
    minutes = (time.perf_counter() - start) / 60
    hits = model.look_at(val.images / 255)[1].argmax(1) == val.labels
    content = io.BytesIO()
    torch.save({'made_from': made_from, 'model': model.state_dict()}, content)
    config = {'script': 'measures', 'made_from': made_from, 'sha256': fingerprint(model),
              'hardware': hardware(train.images.device)}
    metrics = {'val_accuracy': round(float(hits.sum()) / len(hits), 6), 'seed': SEED,
               'parameters': sum(parameter.numel() for parameter in model.parameters()),
               'train_minutes': float(f'{minutes:.6g}')}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / 'config.json', json.dumps(config, indent=2) + '\n')
    write_atomic(folder / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    write_atomic(path, content.getvalue())
    return model


class Judge:
    """A classifier and the real images that others are held against.

    Args:
        classifier: gives features and log p(y|x).
        images: real ones, (N, 784) in [0, 1].
        labels: their classes, (N,).
    """

    def __init__(self, classifier: DigitClassifier, images: Tensor, labels: Tensor):
        self.classifier = classifier
        self.features, _ = classifier.look_at(images)
        self.shares = class_shares(labels)

    def glance(self, images: Tensor) -> dict[str, float]:
        """The Fréchet distance, and the smallest share of a class, of (M, 784) in [0, 1]."""
        features, log_probs = self.classifier.look_at(images)
        return {'frechet': frechet_distance(self.features, features),
                'class_share_min': float(class_shares(log_probs.argmax(1)).min())}

    def measure(self, images: Tensor) -> dict[str, float]:
        """Every measure of this module, by its name in `metrics.json`, of (M, 784) in [0, 1]."""
        features, log_probs = self.classifier.look_at(images)
        shares = class_shares(log_probs.argmax(1))
        return {'frechet': frechet_distance(self.features, features),
                'inception_score': inception_score(log_probs),
                'class_share_min': float(shares.min()), 'class_share_max': float(shares.max()),
                'class_kl': categorical_kl(shares, self.shares),
                **manifold_measures(self.features, features)}
