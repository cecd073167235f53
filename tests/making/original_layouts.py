"""Weights under the names of the published networks, worked out from diffusers' names."""

import torch


def swapped(value):
    """Shift and scale change places in the last modulation."""
    return torch.cat(value.chunk(2)[::-1])


def as_sd3(tensors):
    """Stability's layout, which ComfyUI's files have, of diffusers' names."""
    result = {"pos_embed": tensors["pos_embed.pos_embed"]}
    plain = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    inside = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    fused = {
        "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        "attn2.to_q": ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        "attn.add_q_proj": ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    }
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("transformer_blocks."))
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        if name in plain:
            result[f"{plain[name]}.{kind}"] = value
        elif name == "norm_out.linear":
            result[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(value)
        elif name.startswith("transformer_blocks."):
            _, i, rest = name.split(".", 2)
            if rest in fused:
                new, parts = fused[rest]
                together = [tensors[f"transformer_blocks.{i}.{part}.{kind}"] for part in parts]
                result[f"joint_blocks.{i}.{new}.{kind}"] = torch.cat(together)
            elif rest in inside:
                both = int(i) == last and rest == "norm1_context.linear"
                result[f"joint_blocks.{i}.{inside[rest]}.{kind}"] = swapped(value) if both else value
    return result


def as_z_image(tensors):
    result = {"norm_final.weight": torch.ones(3)}  # in the published file, and used by nobody
    for key, value in tensors.items():
        new = key.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
        new = new.replace("attention.to_out.0.", "attention.out.").replace("attention.norm_", "attention.")
        new = new.replace("attention.q.", "attention.q_norm.").replace("attention.k.", "attention.k_norm.")
        if ".to_q." in new:
            result[new.replace("to_q", "qkv")] = torch.cat([tensors[key.replace("to_q", f"to_{c}")] for c in "qkv"])
        elif ".to_k." not in new and ".to_v." not in new:
            result[new] = value
    return result


def as_flux2(tensors):
    plain = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    inside = {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_add_out": "txt_attn.proj",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
    single = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
    single |= {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
    fused = {"attn.to_q": ("img", ("to_q", "to_k", "to_v"))}
    fused["attn.add_q_proj"] = ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))
    result = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        kind = "scale" if ".norm_" in name else kind
        if name in plain:
            result[f"{plain[name]}.{kind}"] = value
        elif name == "norm_out.linear":
            result[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(value)
        else:
            blocks, i, rest = name.split(".", 2)
            if blocks == "single_transformer_blocks":
                result[f"single_blocks.{i}.{single[rest]}.{kind}"] = value
            elif rest in inside:
                result[f"double_blocks.{i}.{inside[rest]}.{kind}"] = value
            elif rest in fused:
                stream, parts = fused[rest]
                together = torch.cat([tensors[f"{blocks}.{i}.attn.{part}.{kind}"] for part in parts])
                result[f"double_blocks.{i}.{stream}_attn.qkv.{kind}"] = together
    return result
