import threading

from federated.registry import Registry


def test_versions_are_in_order_of_publication(registry, publish):
    ids = [publish(bytes([number]), round_number=9 - number) for number in range(3)]
    assert [record.version_id for record in registry.versions()] == ids


def test_versions_of_one_run(registry, publish):
    publish(b"one")
    publish(b"two", run_id="run-b")
    assert [record.manifest.run_id for record in registry.versions("run-b")] == ["run-b"]


def test_lineage_is_newest_first_and_leaves_side_branches_out(registry, publish):
    root = publish(b"root")
    side = publish(b"side", round_number=1, parent=root)
    tip = publish(b"tip", round_number=1, parent=root, run_id="run-b")
    assert [record.version_id for record in registry.lineage()] == [tip, root]
    assert [record.version_id for record in registry.lineage(side)] == [side, root]


def test_one_thread_reads_while_another_writes(location, manifest_for):
    done, counts = threading.Event(), []
    with Registry.open(location) as registry:

        def read():
            while not done.is_set():
                counts.append(len(registry.versions()))

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(15):
            registry.publish(manifest_for(bytes([number]), round_number=number), bytes([number]))
        done.set()
        reader.join()
        assert len(registry.versions()) == 15
    assert counts == sorted(counts)
