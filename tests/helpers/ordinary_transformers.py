"""Transformers as people write them, whose head_dim is their embedding over their heads, and data to train them on."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY, CONTEXT = 32, 16


class Block(nn.Module):
    """Attention with fused projections, and a perceptron of four times the width."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        assert dim % heads == 0
        self.heads, self.causal = heads, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in self.qkv(self.ln_1(x)).split(dim, 2))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(heads.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.ln_2(x))


class Trained(LightningModule):
    """A module that AdamW trains."""

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=1e-3)


class NanoGPT(Trained):
    """A GPT whose readout is its embedding."""

    def __init__(self, n_layer: int = 2, n_head: int = 2, n_embd: int = 32, vocab_size: int = VOCABULARY) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(CONTEXT, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, causal=True) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = batch[0]
        x = self.wte(tokens[:, :-1]) + self.wpe(torch.arange(tokens.shape[1] - 1))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), tokens[:, 1:].flatten())


class ViT(Trained):
    """A vision Transformer with a class token."""

    def __init__(self, depth: int = 2, num_heads: int = 2, embed_dim: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(1, embed_dim, 4, 4), nn.Linear(embed_dim, classes)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 5, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.patch(batch[0]).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)[:, 0]), batch[1])


class Wrapped(Trained):
    """A language model of Hugging Face."""

    model: Any

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0][:, :CONTEXT], labels=batch[0][:, :CONTEXT]).loss
        return loss


class GPT2(Wrapped):
    def __init__(self, n_layer: int = 2, n_head: int = 2, n_embd: int = 32) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        rates: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes: Any = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": CONTEXT}
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **rates))


class Llama(Wrapped):
    def __init__(
        self,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        hidden_size: int = 32,
        intermediate_size: int = 64,
    ) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: Any = {"num_hidden_layers": num_hidden_layers, "num_attention_heads": num_attention_heads}
        sizes |= {"num_key_value_heads": num_key_value_heads, "hidden_size": hidden_size}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=intermediate_size, **sizes))


class Text(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        steps = torch.randint(1, 4, (192, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(steps.cumsum(-1) % VOCABULARY), batch_size=16)


class Images(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        draws = torch.Generator().manual_seed(0)
        labels, patterns = torch.randint(4, (192,), generator=draws), torch.randn(4, 1, 8, 8, generator=draws)
        images = patterns[labels] + 0.3 * torch.randn(192, 1, 8, 8, generator=draws)
        return DataLoader(TensorDataset(images, labels), batch_size=16)
