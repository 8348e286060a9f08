"""Every run that report and README show: its name, the command that makes it, and its minutes.

`make -C report results` makes them, `a3_evidence.py` and `a3_compare.py` draw what several of them
show together, and `report/measured.py` typesets their numbers. Needs nothing but Python.
"""

from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """One run: `name` is its folder in `report/results/`, `command` what follows `python code/`,
    `minutes` what it takes on two cores, `data` the folder inside `--data_dir` with its data.
    """
    name: str
    command: str
    minutes: float
    data: str = ''

    @property
    def script(self) -> str:
        """The name of the script, such as `a3_vae`."""
        return self.command.split()[0].removesuffix('.py')

    @property
    def words(self) -> list[str]:
        """The arguments."""
        return self.command.split()[1:]

    def has_weights(self, results: Path) -> bool:
        """Whether the run has finished and its trained weights are still there."""
        folder = results / self.name
        return (folder / 'metrics.json').is_file() and (folder / 'checkpoint.pt').is_file()


TEMPLATE_GAN = ('--arch mlp --n_epochs 100 --batch_size 64 --lr 2e-4 --beta1 0.9 --beta2 0.999 '
                '--schedule constant --penalty 0 --average 0 --precision fp32')
ASKED_FOR = [  # by the questions
    Job('vae_z20', 'a3_vae.py --zdim 20', 5.5),
    Job('vae_z2', 'a3_vae.py --zdim 2', 5.5),
    Job('gan', 'a3_gan.py', 11),
    Job('nf', 'a3_nf.py', 27),
    Job('nf_mlp', 'a3_nf.py --arch mlp', 14),
]
MAIN = [
    *ASKED_FOR,
    Job('vae_z20_own_bits', 'a3_vae.py --zdim 20', 5.5, data='MNIST/raw'),  # no .amat files there
    Job('gan_template', f'a3_gan.py {TEMPLATE_GAN}', 16),
    *(Job(f'vae_z{zdim}', f'a3_vae.py --zdim {zdim}', 6) for zdim in (3, 4, 5, 10)),
    Job('vae_logistic_z20', 'a3_vae.py --likelihood logistic', 12),
    *(Job(f'{model}_z{zdim}', f'a3_ae.py --model {model} --zdim {zdim}', 4)
      for zdim in (20, 2) for model in ('ae', 'dae')),
    *(Job(f'{job.name}_seed{seed}', f'{job.command} --seed {seed}', job.minutes)
      for seed in (43, 44) for job in ASKED_FOR if job.name in ('vae_z20', 'gan', 'nf')),
]
# For each table of ablations: the script, the arguments that all its runs share, the figures that
# it shows, what is changed in each run, the seeds of each, and the minutes of one run.
ABLATIONS = {
    'vae': ('a3_vae.py', '--zdim 20 --epochs 10 --iw_samples 100',
            ('val_neg_elbo_nats', 'train_neg_elbo_nats'),
            ('', '--skip no', '--n_layers 4', '--hidden_dim 160', '--augment 0'),
            (42, 43, 44), 1),
    'gan': ('a3_gan.py', '--n_epochs 5', ('val_frechet', 'class_share_min', 'd_fake'),
            ('', '--arch mlp', '--penalty 0', '--beta1 0.5'),
            (42, 43, 44), 2),
    'nf': ('a3_nf.py', '--epochs 1', ('val_bpd', 'val_frechet'),
           ('', '--plan 0', '--plan 16', '--n_layers 1'), (42, 43, 44), 4),
}
FIGURES = [Job('evidence', 'a3_evidence.py', 13), Job('compare', 'a3_compare.py', 16)]
# The models that are compared, each with the runs of all its seeds, and their names in tables.
COMPARED = {'vae_z20': 'VAE', 'vae_logistic_z20': 'VAE, grey', 'gan': 'GAN',
            'gan_template': 'GAN, template', 'nf': 'flow', 'nf_mlp': 'flow, template'}
AUTOENCODERS = [f'{kind}_z{zdim}' for zdim in (2, 20) for kind in ('ae', 'dae', 'vae')]
FLOWS = ['nf', 'nf_mlp']
LATENT_SIZES = [f'vae_z{zdim}' for zdim in (2, 5, 10, 20)]
MONTE_CARLO = [f'vae_z{zdim}' for zdim in (2, 3, 4, 5, 10, 20)]
NEEDED = {  # by figures, with their weights
    'evidence': AUTOENCODERS + FLOWS + MONTE_CARLO[1:-1],
    'compare': [job.name for job in MAIN if job.name.partition('_seed')[0] in COMPARED],
}


def find(name: str) -> Job:
    """The job with that name, among all."""
    return next(job for job in every_job() if job.name == name)


def ablation_jobs(table: str) -> list[Job]:
    """The runs of one table of ablations, in folders `ablations/…`."""
    script, shared, _, choices, seeds, minutes = ABLATIONS[table]
    settings = [f'{choice} --seed {seed}'.removesuffix(' --seed 42').strip()
                for choice in choices for seed in seeds]
    return [Job('_'.join(['ablations/' + table, *setting.replace('--', '').split()]),
                f'{script} {shared} {setting}'.strip(), minutes) for setting in settings]


def every_job() -> list[Job]:
    """All runs, in the order in which they are to be made."""
    return MAIN + [job for table in ABLATIONS for job in ablation_jobs(table)] + FIGURES


def seeds_of(name: str) -> list[Job]:
    """The runs of a compared model, one for each seed."""
    return [job for job in MAIN if job.name.partition('_seed')[0] == name]
