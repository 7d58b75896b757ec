package mirror

import (
	"context"
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

// Consul loses all of kedge's keys, under a hundred agents that run what Git names: none of them switches, and the
// next release is rolled out as usual.
func TestConsulEmptiedUnderAHundredAgents(t *testing.T) {
	t.Parallel()
	const size, budget = 100, 20
	cluster := kvtest.StartConsul(t, kvtest.ConsulOptions{Clients: []string{"c1", "c2"}, ACL: true})
	f := &fleet{t: t, id: unitID(t, "prod/web/app"), dir: t.TempDir(), post: shortCommand}
	one, two := f.release("1"), f.release("2")
	file := func(p deployments.Pointer) map[string]string {
		text := fmt.Sprintf("release: %s\nrollout: {canary: 2, max_unavailable: %d}\n", p, budget)
		return map[string]string{"prod/web/app.yaml": text}
	}
	o := gittest.New(t)
	o.Push(file(one))
	m := start(t, Config{Store: cluster.Open(cluster.RootToken), Repo: o.Bare})
	ctx, cancel := context.WithCancel(t.Context())
	wait := f.start(ctx, cluster, size)
	defer wait()
	defer cancel()
	f.await(one, size)
	was := m.record(f.id.String(), func(r deployments.Record) bool { return r.Rollout == nil && r.Target == one })

	f.most.Store(0)
	began := time.Now()
	cluster.CLI(cluster.RootToken, "", "kv", "delete", "-recurse", "kedge/")
	now := m.record(f.id.String(), func(r deployments.Record) bool {
		return r.Rollout == nil && r.Target == one && r.Generation > was.Generation
	})
	await(t, time.Minute, "all agents know the new record", func() error {
		for _, a := range f.agents {
			if u := a.Report()[f.id.Role].Units[f.id.Unit]; u.Generation != now.Generation {
				time.Sleep(50 * time.Millisecond) // to look takes time that the agents need
				return fmt.Errorf("one knows generation %d, of %d", u.Generation, now.Generation)
			}
		}
		return nil
	})
	t.Logf("%d agents go by a new record after %v", size, time.Since(began).Round(time.Millisecond))
	if most := f.most.Load(); most != 0 || f.on(one) != size {
		t.Errorf("%d nodes switched at once, and %d run what they ran", most, f.on(one))
	}

	o.Push(file(two))
	f.await(two, size)
	if most := f.most.Load(); most > budget || most < 2 {
		t.Errorf("%d nodes switched at once, at most %d may", most, budget)
	}
}
