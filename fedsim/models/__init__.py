"""Models: any `nn.Module` from images in [0, 1] (or tokens) to logits works; these are the ones the papers use, and their
initializations."""

from fedsim.models.bert import Bert, bert_tiny
from fedsim.models.bottleneck import (
    Bottleneck,
    ConvolutionalBottleneck,
    Dropout,
    DropoutBottleneck,
    Precode,
    Stochastic,
    VariationalBottleneck,
)
from fedsim.models.imprint import Imprinted, ImprintModule, imprinted
from fedsim.models.init import Default, He, Init, Kaiming, Normal, Uniform, Xavier
from fedsim.models.layers import ACTIVATIONS, Classifier, Normalize, activation_of, norm_of
from fedsim.models.zoo import lenet, mcmahan_cnn, mlp, mlp_2nn, precode_mlp, resnet18, resnet20

__all__ = [
    "ACTIVATIONS",
    "Bert",
    "Bottleneck",
    "Classifier",
    "ConvolutionalBottleneck",
    "Default",
    "Dropout",
    "DropoutBottleneck",
    "He",
    "ImprintModule",
    "Imprinted",
    "Init",
    "Kaiming",
    "Normal",
    "Normalize",
    "Precode",
    "Stochastic",
    "Uniform",
    "VariationalBottleneck",
    "Xavier",
    "activation_of",
    "bert_tiny",
    "imprinted",
    "lenet",
    "mcmahan_cnn",
    "mlp",
    "mlp_2nn",
    "norm_of",
    "precode_mlp",
    "resnet18",
    "resnet20",
]
