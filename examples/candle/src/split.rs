//! The split on candle's tensors: candle's memory and stream, one kernel launch, no copy.

use candle_core::{
    CudaStorage, DType, Device, Error, IndexOp, Result, Storage, Tensor, bail, op::BackpropOp,
};
use gdn::{Heads, Layout, Packed, Packing, Unpacked, cuda};
use half::bf16;

/// Dense bf16 `mixed_qkvz` and `mixed_ba` on a GPU, as `mixed_qkv`, `z`, `b` and `a`.
fn split(layout: &Layout, qkvz: &Tensor, ba: &Tensor) -> Result<[Tensor; 4]> {
    let device = qkvz.device().as_cuda_device()?;
    let (n, heads) = (qkvz.dim(0)?, layout.heads);
    let hv = heads.num_v_heads();
    let ((qkvz, qkvz_at), (ba, ba_at)) = (qkvz.storage_and_layout(), ba.storage_and_layout());
    let (Storage::Cuda(qkvz), Storage::Cuda(ba)) = (&*qkvz, &*ba) else { bail!("not on a GPU") };
    let (Some((from, to)), Some((ba_from, ba_to))) =
        (qkvz_at.contiguous_offsets(), ba_at.contiguous_offsets())
    else {
        bail!("not contiguous")
    };
    let qkvz = qkvz.as_cuda_slice::<bf16>()?.slice(from..to);
    let ba = ba.as_cuda_slice::<bf16>()?.slice(ba_from..ba_to);
    // SAFETY: the split writes every element.
    let new = |features: usize| unsafe { device.alloc::<bf16>(n * features) };
    let (mut qkv, mut z) = (new(heads.qkv_features())?, new(heads.z_features())?);
    let (mut b, mut a) = (new(hv)?, new(hv)?);

    let gpu = cuda::Gpu::on(&device.cuda_stream()).map_err(Error::wrap)?;
    let from = Packed {
        mixed_qkvz: cuda::Rows::new(&qkvz, n, heads.qkvz_features()).map_err(Error::wrap)?,
        mixed_ba: cuda::Rows::new(&ba, n, heads.ba_features()).map_err(Error::wrap)?,
    };
    let to = Unpacked {
        mixed_qkv: cuda::RowsMut::new(&mut qkv, n, heads.qkv_features()).map_err(Error::wrap)?,
        z: cuda::RowsMut::new(&mut z, n, heads.z_features()).map_err(Error::wrap)?,
        b: cuda::RowsMut::new(&mut b, n, hv).map_err(Error::wrap)?,
        a: cuda::RowsMut::new(&mut a, n, hv).map_err(Error::wrap)?,
    };
    cuda::split(layout, from, to, &gpu).map_err(Error::wrap)?;

    let tensor = |slice, shape: &[usize]| {
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    };
    Ok([
        tensor(qkv, &[n, heads.qkv_features()]),
        tensor(z, &[n, hv, heads.head_v_dim()]),
        tensor(b, &[n, hv]),
        tensor(a, &[n, hv]),
    ])
}

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let layout = Layout::new(Heads::preset("Qwen3-Next-80B-A3B").map_err(Error::wrap)?, Packing::Interleaved);
    let (n, heads) = (5, layout.heads);
    let random = |features| Tensor::randn(0f32, 1f32, (n, features), &device)?.to_dtype(DType::BF16);
    let (qkvz, ba) = (random(heads.qkvz_features())?, random(heads.ba_features())?);
    let [qkv, z, b, _a] = split(&layout, &qkvz, &ba)?;
    // The first head's queries and write strengths lie first in both.
    let same = |x: Tensor, y: Tensor| x.ne(&y)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>();
    let dk = heads.head_k_dim();
    let wrong = same(qkv.i((.., ..dk))?, qkvz.i((.., ..dk))?)?
        + same(b.i((.., ..heads.ratio()))?, ba.i((.., ..heads.ratio()))?)?;
    println!("mixed_qkv {:?}, z {:?}, {wrong} wrong", qkv.shape(), z.shape());
    Ok(())
}
