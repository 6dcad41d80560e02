"""Using a trained model: text from it.

    from dlcm_lightning.inference import Generator, Sampling

    generator = Generator.load("runs/quickstart")              # a run, or what `dlcm export` wrote
    for completion in generator.generate(["The river", "def area("], Sampling(seed=1, max_tokens=64)):
        print(completion.text, completion.finish, completion.concepts)
"""

from dlcm_lightning.inference.generator import Begun, Completion, Generator, Piece
from dlcm_lightning.inference.sampling import Sampling

__all__ = ["Begun", "Completion", "Generator", "Piece", "Sampling"]
