"The first rasteriser, one segment after the other: the oracle of the one in large operations."

import torch

from dfsbir.inversion.strokes import flatten_beziers


def pixel_centres(lines, size):
    return (torch.arange(size, device=lines.device, dtype=lines.dtype) + 0.5) / size


class LoopDistance(torch.autograd.Function):
    "Distance of every pixel centre to each polyline: (M,P+1,2) and a side -> (M,side,side)."

    @staticmethod
    def forward(ctx, lines, size):
        grid = pixel_centres(lines, size)
        best = lines.new_full((len(lines), size, size), torch.inf)  # squared distance so far
        along = torch.zeros_like(best)
        nearest = torch.zeros_like(best, dtype=torch.uint8)
        for k in range(lines.shape[1] - 1):
            a = lines[:, k, :, None]
            d = (lines[:, k + 1] - lines[:, k])[..., None]
            x, y = (grid - a).unbind(1)
            unit = d / d.square().sum(1, keepdim=True).clamp_min(1e-12)  # a dot has t = 0
            t = ((x * unit[:, 0])[:, None, :] + (y * unit[:, 1])[:, :, None]).clamp_(0, 1)
            away = torch.addcmul(x[:, None, :], t, d[:, :1], value=-1).square_()
            dy = torch.addcmul(y[:, :, None], t, d[:, 1:], value=-1)
            away.addcmul_(dy, dy)
            closer = away < best
            nearest.masked_fill_(closer, k)
            torch.where(closer, t, along, out=along)
            torch.minimum(best, away, out=best)
        ctx.save_for_backward(lines, best.sqrt_(), along, nearest)
        return best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        lines, distance, t, nearest = ctx.saved_tensors
        (m, corners, _), size = lines.shape, distance.shape[-1]
        grid = pixel_centres(lines, size)
        nearest = nearest.view(m, -1).long()

        def of_nearest(table):
            "A number of each segment, (M,P), for the nearest one of each pixel."
            return table.gather(1, nearest).view_as(t)

        start, along = lines[:, :-1], lines[:, 1:] - lines[:, :-1]
        rate = grad / distance.clamp_min(1e-12)
        f = lines.new_empty(4, m, size, size)  # g (u - q) / d, in x and y, then the same times t
        for i, u in enumerate((grid, grid[:, None])):
            from_start = u - of_nearest(start[..., i])
            torch.addcmul(from_start, t, of_nearest(along[..., i]), value=-1, out=f[i])
            f[i].mul_(rate)
        torch.mul(f[:2], t, out=f[2:])
        owner = f.new_zeros(m, corners - 1, size * size).scatter_(1, nearest[:, None], 1.0)
        total, total_t = torch.einsum("fmi,mki->mkf", f.view(4, m, -1), owner).split(2, -1)
        out = torch.zeros_like(lines)
        out[:, :-1] += total_t - total
        out[:, 1:] -= total_t
        return out, None


def loop_draw(strokes, size, softness=0.01, segments=8, block=2**18):
    "The drawings (N,1,size,size), so many at a time as there are stroke-pixels in a block."
    n, s = strokes.opacity.shape
    step = max(1, block // (s * size * size))
    images = []
    for i in range(0, max(n, 1), step):
        part = strokes[i : i + step]
        lines = flatten_beziers(part.points, segments).flatten(0, 1)
        distance = LoopDistance.apply(lines, size).view(len(part), s, size, size)
        half = part.width[..., None, None] / 2
        full = part.opacity[..., None, None] / torch.sigmoid(half / softness)
        ink = full * torch.sigmoid((half - distance) / softness)
        images.append((1 - ink).prod(1)[:, None])
    return torch.cat(images)
