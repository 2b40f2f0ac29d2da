"""The planner: volumes, intervals and maxima by hand, invariances, published runs side by side, odd input."""

import math

import pytest
from check_lab import facts
from lab import ROOT

from truthward.check.facts import KNOWN, Shape
from truthward.check.memory import GB, WASTE, Job, States, job_of, peak, predict
from truthward.errors import UserError
from truthward.plan import goodput, published, scale
from truthward.plan.cost import Learning, forward_flops, gathers, rollout, step, volume
from truthward.plan.estimate import estimates, smallest
from truthward.plan.machines import ACROSS, KINDS, WITHIN, Cluster, kind
from truthward.plan.show import alone, money, provenance, remarks, show, spoken

H100 = KINDS["h100-80gb"]
SEVEN = Shape(7_000_000_000, 32, 4096, 11008, 32, 8, 32000)
FULL = Learning(SEVEN, SEVEN.parameters, 2)
LORA = Learning(SEVEN, 40_000_000, 2)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(ROOT)


# --------------------------------------------------------------------------------------------------------------- network


def test_stages_of_zero_send_two_and_three_times_the_parameters():
    """Rajbhandari et al. 2020, section 7: 2 Psi for stages 0 to 2, 3 Psi for stage 3; each short of 1/N."""
    sent = [volume(FULL, zero, 64) / (14e9 * 63 / 64) for zero in range(4)]
    assert sent == pytest.approx([2, 2, 2, 3])
    assert volume(FULL, 0, 1) == 0


def test_lora_sends_its_adapters_and_gathers_the_frozen_base_under_stage_three():
    assert volume(LORA, 2, 2) == pytest.approx(2 * 80e6 / 2)
    assert volume(LORA, 3, 2) == pytest.approx((2 * 14e9 + 80e6) / 2)


def test_accumulation_costs_stages_two_and_three_more():
    assert volume(FULL, 1, 8, 4) == volume(FULL, 1, 8, 1)
    assert volume(FULL, 2, 8, 4) / volume(FULL, 2, 8, 1) == pytest.approx((4 + 1) / 2)
    assert volume(FULL, 3, 8, 4) == 4 * volume(FULL, 3, 8, 1)


def test_stage_three_gathers_for_each_pass():
    assert gathers(FULL._replace(passes=1)) == 3  # DPO: the reference's forward, the policy's forward and backward
    assert gathers(FULL._replace(models=2)) == 4


def test_a_ring_by_hand():
    """8 devices, 8 GB: 7/8 of it at 450 GB/s, 7 steps of 3 us. On 2 hosts half of 1 GB at 50 GB/s too, in one step."""
    one, two = Cluster.of(H100, 8), Cluster.of(H100, 16)
    assert one.pass_time(8e9) == pytest.approx(7e9 / 450e9 + 7 * WITHIN)
    assert two.pass_time(8e9) == pytest.approx(7e9 / 450e9 + 7 * WITHIN + 0.5e9 / 50e9 + ACROSS)
    assert two.pass_time(0, 10) == pytest.approx(10 * (7 * WITHIN + ACROSS))
    assert Cluster.of(H100, 1).pass_time(8e9) == 0


# ------------------------------------------------------------------------------------------------------------- operations


def test_operations_by_hand():
    forward = 100 * (2 * 7e9 + 4 * 32 * 4096 * 50)
    assert forward_flops(SEVEN, 100, 50) == forward
    assert FULL.flops(100, 50) == 3 * forward  # 6 P and attention's
    assert LORA.flops(100, 50) == 2 * forward  # no gradients of the weights
    assert LORA._replace(passes=1).flops(100, 50) == 3 * forward
    assert FULL._replace(recompute=True).flops(100, 50) == 4 * forward
    assert FULL._replace(recompute=True).useful(100, 50) == 3 * forward


def test_a_step_hides_the_network_under_half_of_its_computing():
    long, short = (step(FULL, Cluster.of(H100, 16), tokens, 1, 3) for tokens in (100_000, 100))
    assert (long.exposed, long.network) == (0, short.network)
    assert short.exposed == pytest.approx(short.network - short.compute / 2)
    cpu = step(FULL, Cluster.of(KINDS["cpu"], 2), 10, 1, 1)
    assert cpu.exposed == cpu.network > 0
    assert step(FULL, Cluster.of(H100, 1), 100, 1, 0).seconds == long.compute / 1000


def test_a_decode_step_reads_all_weights_and_grows_with_the_cache():
    one = rollout(SEVEN, Cluster.of(H100, 8), 1, 100, 10, 2)
    assert one.decode / 10 == pytest.approx((14e9 + 131072 * 105) / (3.35e12 * 0.6))
    assert one.cache == 131072 * 110  # 2 x 32 layers x 4096 / 4 x 2 bytes a token
    many = rollout(SEVEN, Cluster.of(H100, 8), 64, 100, 10, 2)
    assert one.decode < many.decode < 2 * one.decode
    assert many.prefill == 64 * one.prefill
    small = Shape(1_000_000, 32, 64, 128, 4, 2, 100)
    assert rollout(small, Cluster.of(H100, 8), 1, 10, 10, 2).decode == pytest.approx(10 * 32 * 20 * 5e-6)


# --------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_best_interval_is_that_of_dalys_figures(hours, minutes):
    """Daly 2006, figures 3 to 5: a checkpoint takes 5 minutes."""
    assert goodput.checkpoint_interval(5, 60 * hours) == pytest.approx(minutes, rel=0.01)
    assert goodput.young(5, 1440) == 120


def test_the_interval_is_the_best_of_its_neighbours():
    write, mtbf, restart = 5.0, 360.0, 10.0
    best = goodput.checkpoint_interval(write, mtbf)
    shares = [goodput.useful_share(best * f, write, mtbf, restart) for f in (0.8, 1.0, 1.25)]
    assert max(shares) == shares[1]
    assert goodput.useful_share(100, 0.001, 1e9, 1) == pytest.approx(1, abs=1e-4)


def test_the_mean_of_the_largest_draw():
    """1 / sqrt(pi) of two; 1.5388 of ten and 2.5076 of a hundred (tables of normal order statistics)."""
    found = [goodput.expected_maximum(n) for n in (1, 2, 10, 100)]
    assert found == pytest.approx([0, 1 / math.sqrt(math.pi), 1.53875, 2.50759], abs=1e-4)
    assert goodput.expected_maximum(100_000) < math.sqrt(2 * math.log(100_000))


def test_llama_threes_own_run_keeps_over_nine_tenths_of_its_time():
    """16,384 GPUs: 419 unexpected interruptions in 54 days, effective training time over 90 % (arXiv 2407.21783, 3.3.4)."""
    found = goodput.goodput(16384, 2048, 12 * 405e9)
    assert found.mtbf / 3600 == pytest.approx(54 * 24 / 419)
    assert 0.9 < found.goodput < 0.96


# ------------------------------------------------------------------------------------------------------- published runs


@pytest.mark.parametrize("run", published.RUNS, ids=lambda r: f"{r.model}-{r.kind}-{r.gpus}-{r.length}")
def test_throughput_is_within_a_quarter_of_what_others_published(run):
    assert published.tokens(run) == pytest.approx(run.tokens, rel=0.25)


def test_ddp_sends_adapters_in_fp32_and_deepspeed_in_bf16():
    zero, one = (next(estimates(facts("cluster-8b", []), Cluster.of(H100, 8), zero=z)) for z in (0, 1))
    assert zero.sent == 2 * one.sent


def test_published_ppo_takes_longer_than_the_models_bound():
    """PPO's time is a lower bound: of DeepSpeed-Chat's 9 hours it explains two."""
    assert 1.5 < published.chat_hours() < 9


# ----------------------------------------------------------------------------------------------------------------- memory


def job(**changes):
    states = States(0, SEVEN.parameters, 2, 2, 4)
    return Job(SEVEN, states, 0, 2, (512, 512, 0), 0.0)._replace(**changes)


def test_more_ranks_never_need_more_memory():
    for zero in range(1, 4):
        totals = [peak(job(ranks=n, zero=zero), "cuda").total for n in (2, 8, 64, 4096)]
        assert totals == sorted(totals, reverse=True)
    totals = [peak(job(ranks=64, zero=zero), "cuda").total for zero in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)


def test_deepspeed_keeps_a_master_copy_and_buckets():
    """bf16: 2 + 2 + 12 bytes a parameter; two buckets of 50M elements."""
    memory = peak(job(ranks=2, zero=1), "cuda")
    assert (memory.weights, memory.gradients, memory.optimizer) == (14e9, 14e9, 42e9)
    assert memory.buffers == 2 * 50e6 * 2
    ahead = peak(job(ranks=2, zero=3), "cuda")
    assert ahead.weights == 7e9 + 2e9  # a billion parameters stay whole
    assert ahead.buffers == 4 * 50e6 * 2


def test_offload_moves_states_to_the_host():
    here, optimizer, everything = (peak(job(ranks=8, zero=3, offload=o), "cuda") for o in ("none", "optimizer", "all"))
    assert here.host == 0
    assert (optimizer.optimizer, optimizer.weights) == (0, here.weights)
    assert optimizer.host == 12 * 7e9 / 8 + 3 * 4 * 7e9 / 8
    assert everything.weights == 2e9
    assert everything.host == optimizer.host + 14e9 / 8
    assert everything.total < optimizer.total < here.total


def test_gradients_come_as_activations_go_unless_they_are_accumulated():
    """Rows long enough that activations lead: the gradients' place is theirs; accumulated, both are there."""
    once, twice = (peak(job(row=(4096, 4096, 0), micros=m), "cuda") for m in (1, 2))
    assert twice.total - once.total == pytest.approx(14e9)


MEASURED = [  # GB at the peak of the first rank on CPUs, in fp32, a few steps (docs/scale.md)
    ("laptop", "full", 2, 0, 3.69),
    ("laptop", "full", 2, 1, 3.33),
    ("laptop", "full", 2, 2, 3.22),
    ("laptop", "full", 2, 3, 4.12),
    ("laptop", "lora", 2, 0, 2.11),
    ("laptop", "lora", 2, 1, 2.17),
    ("laptop", "lora", 2, 2, 2.16),
    ("tiny", "lora", 1, 0, 0.59),
    ("tiny", "lora", 1, 1, 0.64),
    ("tiny", "lora", 1, 2, 0.64),
    ("tiny", "lora", 1, 3, 0.66),
    ("tiny", "lora", 2, 0, 0.57),
    ("tiny", "lora", 2, 1, 0.62),
    ("tiny", "lora", 2, 2, 0.62),
    ("tiny", "lora", 2, 3, 0.63),
]


@pytest.mark.parametrize(("recipe", "tune", "ranks", "zero", "measured"), MEASURED)
def test_memory_is_within_a_tenth_of_what_was_measured_of_a_rank(recipe, tune, ranks, zero, measured):
    changes = ['stages=["base","sft"]', "unexplained=warn", f'sft.tune="{tune}"']
    changes += [f"launch.ranks={ranks}", f"launch.zero={zero}"]
    assert predict(facts(recipe, changes), "sft", "cpu", 4).total / GB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("name", "billions"), [("3.2-1b", 1.236), ("3.1-8b", 8.03), ("3.1-70b", 70.55), ("3.1-405b", 405.85)]
)
def test_llamas_sizes(name, billions):
    assert Shape.of(KNOWN[f"llama-{name}"]).parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert facts("cluster-8b", [f'model.base="meta-llama/Llama-{name.upper()}-Instruct"']).shape.layers


# ------------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "recipes").glob("*.toml")))
@pytest.mark.parametrize("name", ["h100-80gb", "cpu"])
def test_every_recipe_plans(recipe, name, capsys):
    subject = facts(recipe, [])
    found = show(subject.recipe, recipe, gpus=2, name=name)
    assert [one.stage for one in found] == ["sft", "reward", "dpo", "ppo"]
    assert all(one.tokens > 0 and 0 < one.utilisation <= KINDS[name].share + 1e-9 and one.seconds > 0 for one in found)
    said = capsys.readouterr().out
    assert "assumed" in said
    assert "a checkpoint each" in said


def test_more_gpus_take_less_time_and_price_scales():
    subject = facts("cluster-8b", [])
    eight, four = (list(estimates(subject, Cluster.of(H100, n))) for n in (8, 4))
    assert [a.useful < b.useful for a, b in zip(eight, four, strict=True)] == [True] * 4
    assert [a.place.memory.total <= b.place.memory.total for a, b in zip(eight, four, strict=True)] == [True] * 4
    assert money(3600, Cluster.of(H100, 8), 2.5) == 20
    assert money(3600, Cluster.of(H100, 8), 5) == 40


def test_layers_that_are_computed_again_keep_their_inputs_alone():
    """Of 32 layers one's activations, and 32 inputs of 4096 tokens x 4096 in bf16: 32 MiB each."""
    kept, again = (peak(job(row=(4096, 4096, 0), recompute=r, micros=2), "cuda") for r in (False, True))
    waste = WASTE["cuda"]["packed"]
    layer = kept.activations / waste / job().shape.layers
    assert again.activations / waste == pytest.approx(layer + job().shape.layers * 4096 * job().shape.hidden * 2)
    assert again.total < kept.total


def test_a_policy_that_a_server_samples_from_has_no_second_copy_here():
    served, local = facts("cluster-8b", []), facts("cluster-8b", ['ppo.engine="local"', 'ppo.engine_url=""'])
    assert job_of(local, "ppo", 2).least == 2 * local.shape.parameters
    assert job_of(served, "ppo", 2).least == job_of(served, "ppo", 2).cache == 0


def test_what_fits_only_with_layers_computed_twice_is_told_so():
    subject, cluster = facts("cluster-8b", ["sft.max_length=8192"]), Cluster.of(KINDS["l40s-48gb"], 8)
    found = smallest(subject, "sft", cluster, 1)
    assert (found.zero, found.recompute) == (3, True)
    (one, *_) = estimates(subject, cluster)
    assert any("launch.gradient_checkpointing" in line for line in remarks([one], cluster))
    chosen = facts("cluster-8b", ["sft.max_length=8192", "launch.gradient_checkpointing=true"])
    assert next(estimates(chosen, cluster, 3)).place.fits


@pytest.mark.parametrize(
    ("recipe", "name", "count"),
    [("cluster-8b", "h100-80gb", 8), ("cluster-8b-full", "h100-80gb", 16), ("cluster-70b", "b200-192gb", 128)],
)
def test_every_stage_of_a_cluster_recipe_fits_where_it_is_meant_to_run(recipe, name, count):
    subject, cluster = facts(recipe, []), Cluster.of(KINDS[name], count)
    assert [one.stage for one in estimates(subject, cluster) if not one.place.fits] == []
    assert list(alone(subject, cluster)) == []


def test_stages_of_one_process_want_a_device_that_holds_the_model():
    (line,) = alone(facts("cluster-70b", []), Cluster.of(H100, 128))
    assert line.startswith("constitution, evals: one process holds the whole model, 131 GB, and a device has 75")


def test_what_does_not_fit_is_told_what_would():
    subject = facts("cluster-8b", ['sft.tune="full"', "sft.max_length=1024"])
    (one, *_) = estimates(subject, Cluster.of(KINDS["l40s-48gb"], 8), zero=0)
    assert not one.place.fits
    assert one.better
    assert one.better.zero == 3
    assert one.better.memory.total < 0.85 * 48e9
    assert any("fits with launch.zero = 3" in line for line in remarks([one], Cluster.of(KINDS["l40s-48gb"], 8)))
    assert smallest(subject, "sft", Cluster.of(KINDS["l40s-48gb"], 1), 1) is None


def test_ranks_without_a_row_are_counted():
    found = list(estimates(facts("cluster-8b", []), Cluster.of(H100, 64)))
    assert found[0].busy == 32
    assert any("32 of 64 ranks have no row" in line for line in remarks(found, Cluster.of(H100, 64)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"name": "h10-80gb"}, "did you mean h100-80gb"),
        ({"gpus": 0}, "0 GPUs are none"),
        ({"gpus": -8}, "-8 GPUs are none"),
        ({"gpus": 10, "hosts": 3}, "take --gpus 12 or --hosts 2"),
        ({"gpus": 4, "hosts": -1}, "--hosts"),
        ({"gpus": 12}, "--gpus 12 or --hosts 2"),
        ({"price": -1.0}, "-1.0 is no price"),
        ({"price": float("nan")}, "nan is no price"),
    ],
)
def test_odd_numbers_are_refused_with_the_nearest_right_one(words, said):
    if words == {"gpus": 12}:
        assert Cluster.of(H100, 12).hosts == 2  # six each
        return
    with pytest.raises(UserError) as refused:
        show(facts("tiny", []).recipe, "tiny", **{"gpus": 8, "name": "h100-80gb", **words})
    assert said in str(refused.value)


def test_a_model_of_unknown_sizes_is_refused():
    with pytest.raises(UserError, match=r"config\.json"):
        show(facts("cluster-8b", ['model.base="some-org/model-7b"']).recipe, "x", gpus=8, name="h100-80gb")


def test_the_command_prints_a_plan(monkeypatch, capsys):
    from truthward import cli

    words = ["truthward", "plan", "recipes/tiny.toml", "--gpus", "8", "--kind", "a100-80gb", "--zero", "3", "--price", "2"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "8 x a100-80gb on 1 host, $2 an hour each" in capsys.readouterr().out


def test_every_kind_says_where_its_numbers_are_from():
    for name, one in KINDS.items():
        assert kind(name) is one
        assert one.source
        assert one.basis in provenance(Cluster.of(one, 1))


def test_spoken():
    assert [spoken(s) for s in (5, 300, 7200, 200_000)] == ["5.0 s", "5.0 min", "2.0 h", "2.3 d"]


# ----------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_name_what_breaks_first():
    assert scale.breaks(scale.point("llama-3.2-1b", 8)) == "nothing yet"
    assert scale.breaks(scale.point("llama-3.1-405b", 8)).startswith("memory")
    assert "network" in scale.breaks(scale.point("llama-3.1-405b", 4096))
    assert scale.point("llama-3.1-8b", 100_000).busy == int(16e6 / 4096)


def test_the_page_has_the_tables_that_the_model_gives():
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    for line in [*scale.lines(lora=False), *scale.lines(lora=True), *published.lines()]:
        assert line in page
