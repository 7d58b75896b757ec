package agent

import (
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

// agentRules are what an agent's token may do.
const agentRules = `
	key_prefix "kedge/desired/" { policy = "read" }
	key_prefix "kedge/pins/"    { policy = "read" }
	key_prefix "kedge/status/"  { policy = "write" }
	session_prefix ""           { policy = "write" }
	node_prefix ""              { policy = "read" }
	agent_prefix ""             { policy = "read" }`

func (w *world) folders() {
	w.t.Helper()
	err := w.store.EnsureFolders(
		w.t.Context(),
		kv.RolePrefix(kv.DesiredPrefix, "prod", "web"),
		kv.RolePrefix(kv.PinsPrefix, "prod", "web"),
	)
	if err != nil {
		w.t.Fatal(err)
	}
}

func TestConsulTokenLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	w.store = consul.Open(consul.RootToken)
	w.folders()
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	w.put(kv.PinKey(app), two.String())
	token := consul.Token(agentRules)
	a := w.start(withMetrics, func(c *Config) { c.Store = consul.Open(token) })
	a.awaitRunning(app, two)
	await(t, "the report", func() (bool, string) {
		r, e := w.reported("web")
		return r.Units["app"].State == deployments.StateConverged && e.Session != "", string(e.Value)
	})
	consul.RevokeToken(token)
	w.put(
		kv.DesiredKey(app),
		`{"target":"file:///r/manifest.yaml@sha256:`+strings.Repeat("a", 64)+`","generation":2}`,
	) // wakes it
	await(t, "the agent to notice", func() (bool, string) {
		trouble := ""
		for _, s := range a.Status().Sources {
			trouble += s.Error
		}
		return trouble != "", w.log.String()
	})
	steadily(t, "a lost token changes nothing", func() (bool, string) { return w.live("app") == "2", w.live("app") })
	if u := a.unit(app); u.State != deployments.StateConverged || u.Running != two {
		t.Errorf("without its token: %+v", u)
	}
	a.awaitReady()
}

func TestConsulAwayAndRestored(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{Persistent: true})
	w.store = consul.Open("")
	one, two, three := w.publish("app", "1"), w.publish("app", "2"), w.publish("app", "3")
	// Without a mirror the agent makes the folder keys itself.
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	snapshot := consul.Snapshot()
	w.desire(app, deployments.Record{Target: two, Generation: 2})
	a.awaitRunning(app, two)

	// A restore brings an older record back: the node stays where it is, and reports that, until a newer one is
	// written.
	consul.Restore(snapshot)
	await(t, "the report after the restore", func() (bool, string) {
		r, e := w.reported("web")
		u := r.Units["app"]
		return e.Session != "" && u.Running == two && u.Reason == deployments.ReasonOldGeneration &&
				u.Generation == 2, string(
				e.Value,
			)
	})
	if v := w.live("app"); v != "2" {
		t.Errorf("the restored record decides: %s is live", v)
	}
	w.desire(app, deployments.Record{Target: one, Generation: 3})
	a.awaitRunning(app, one)
	w.desire(app, deployments.Record{Target: two, Generation: 4})
	a.awaitRunning(app, two)
	a.stop()

	consul.Servers[0].Stop()
	a = w.start()
	a.awaitRunning(app, two)
	consul.Servers[0].Start()
	consul.WaitReady()
	w.desire(app, deployments.Record{Target: three, Generation: 5})
	a.awaitRunning(app, three)
	await(t, "the report after the outage", func() (bool, string) {
		r, e := w.reported("web")
		return e.Session != "" && r.Units["app"].Running == three, string(e.Value)
	})
}
