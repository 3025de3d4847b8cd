import sys, shutil
sys.path.insert(0,'/work/main/tests')
from made_project import snakemake
from test_workflow import jobs
from cbtm_pipeline.provenance import records
def test_it(finished, tmp_path):
    assert "Nothing to be done" in snakemake(finished, "-n")
    p = tmp_path/"p"; shutil.copytree(finished, p, symlinks=True)
    (p/"change.yaml").write_text("train: {validations: 3}")
    before = records.read_page(p/"results/report.html")
    text = (p/"results/report.html").read_text()
    assert "<td>score_expert</td>" in text, text[-4000:]
    out = snakemake(p, "--cores", "2", configfiles=["small.yaml","change.yaml"])
    print(out)
    after = records.read_page(p/"results/report.html")
    assert {k for k in after["made_from"] if after["made_from"][k]!=before["made_from"].get(k)} == {"plans"}
    assert "Nothing to be done" in snakemake(p, "-n", configfiles=["small.yaml","change.yaml"])
