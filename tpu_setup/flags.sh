# shellcheck shell=bash
# Recommended compiler flags of each chip: what they do and where they are published. Sourced by
# common.sh; `tpu_vm.sh flags --type=v5p-64` prints the rows of a chip. Every row is accepted by the
# chip's own compiler (tests/tpu_setup/test_flags.py); an unknown name would stop the program.
#
# MaxText's async collective fusion is for v5e alone: for the other chips libtpu 0.0.42 refuses the
# set ("not supported/recommended on platforms other than TPU v5e").

# chips, variable, setting, what it does, source. `slices` means several slices of any TPU.
flag_table() {
  cat <<'TABLE'
tpu|LIBTPU_INIT_ARGS|--xla_tpu_enable_latency_hiding_scheduler=true|starts collectives early and waits for them late, so that matmuls run meanwhile|AXLearn compiler_options.py
v4|LIBTPU_INIT_ARGS|--xla_enable_async_all_gather=true|lets weight gathers run beside compute; the default on later chips|AXLearn compiler_options.py
v4|LIBTPU_INIT_ARGS|--xla_enable_async_collective_permute=true|the same for neighbour exchange (ring attention, pipeline)|AXLearn compiler_options.py
v5litepod|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion=true|fuses a collective with the matmuls it overlaps|MaxText xla_flags_library.py
v5litepod|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true|does so for weight gathers|MaxText xla_flags_library.py
v5litepod|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion_multiple_steps=true|spreads one gather over several matmuls|MaxText xla_flags_library.py
v5litepod|LIBTPU_INIT_ARGS|--xla_tpu_overlap_compute_collective_tc=true|drives collectives from the TensorCore while it computes|MaxText xla_flags_library.py
v5litepod|LIBTPU_INIT_ARGS|--xla_enable_async_all_gather=true|splits gathers into start and done, which the four above need|MaxText xla_flags_library.py
v6e|LIBTPU_INIT_ARGS|--xla_tpu_scoped_vmem_limit_kib=81920|lets a fusion use 80 of the 128 MiB of VMEM, so that matmul tiles are larger (MoE setting)|MaxText xla_flags_library.py
v6e|LIBTPU_INIT_ARGS|--xla_tpu_use_minor_sharding_for_major_trivial_input=true|with the next: turns all-reduce and slice of gradients into reduce-scatter|MaxText xla_flags_library.py
v6e|LIBTPU_INIT_ARGS|--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1|allows that for groups of every size|MaxText xla_flags_library.py
slices|LIBTPU_INIT_ARGS|--xla_tpu_enable_data_parallel_all_reduce_opt=true|starts the gradient sum over the data-centre network during the backward pass|MaxText xla_flags_library.py
slices|LIBTPU_INIT_ARGS|--xla_tpu_data_parallel_opt_different_sized_ops=true|does so for gradients of unlike sizes|MaxText xla_flags_library.py
slices|LIBTPU_INIT_ARGS|--xla_tpu_enable_megascale_barrier=true|orders collectives between slices|AXLearn compiler_options.py
slices|LIBTPU_INIT_ARGS|--xla_tpu_enable_sunk_dcn_allreduce_done_with_host_reduction=true|groups sums between slices into few stages|AXLearn compiler_options.py
gpu|XLA_FLAGS|--xla_gpu_enable_latency_hiding_scheduler=true|starts collectives early and waits for them late|JAX docs, GPU performance tips
gpu|XLA_FLAGS|--xla_gpu_all_gather_combine_threshold_bytes=134217728|gathers the weights of a layer in one call|JAX docs, GPU performance tips
gpu|XLA_FLAGS|--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728|the same for sharded gradients|JAX docs, GPU performance tips
gpu|XLA_FLAGS|--xla_gpu_all_reduce_combine_threshold_bytes=134217728|the same for replicated gradients|JAX docs, GPU performance tips
gpu|XLA_PYTHON_CLIENT_MEM_FRACTION|.92|JAX takes 92% of the memory in place of 75%|JAX docs, GPU memory allocation
TABLE
}

flag_rows() { # flag_rows CHIP SLICES: the rows that apply; CHIP as the cloud says, or gpu
  local chips variable setting why source
  while IFS='|' read -r chips variable setting why source; do
    case "$chips" in
      "$1") ;;
      tpu) [ "$1" != gpu ] || continue ;;
      slices) [ "$1" != gpu ] && [ "$2" -gt 1 ] || continue ;;
      *) continue ;;
    esac
    printf '%s|%s|%s|%s\n' "$variable" "$setting" "$why" "$source"
  done < <(flag_table)
}

flag_env() { # flag_env CHIP SLICES: one line NAME=VALUE a variable
  local name variable setting rest value
  for name in LIBTPU_INIT_ARGS XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION; do
    value=''
    while IFS='|' read -r variable setting rest; do
      [ "$variable" != "$name" ] || value="$value $setting"
    done < <(flag_rows "$1" "$2")
    [ -z "$value" ] || echo "$name=${value# }"
  done
}

print_flags() { # print_flags CHIP SLICES: for a person
  local variable setting why source
  while IFS='|' read -r variable setting why source; do
    printf '%s %s\n    %s (%s)\n' "$variable" "$setting" "$why" "$source"
  done < <(flag_rows "$1" "$2")
}
