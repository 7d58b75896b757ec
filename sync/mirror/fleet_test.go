package mirror

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
	"kedge/sync/agent"
	"kedge/sync/git/gittest"
)

// fleet is many real agents in this process, each with its own store and token. Their releases have no files, so that a
// switch is cheap.
type fleet struct {
	t      *testing.T
	id     deployments.UnitID
	dir    string
	post   []deployments.Command // of each release
	agents []*agent.Agent

	// switching counts the agents that switch now, as their drains show; most is its maximum.
	switching, most atomic.Int64
}

// shortCommand makes a switch take as long as a shell takes.
var shortCommand = []deployments.Command{{Run: ":", Timeout: time.Minute}}

// release makes a release.
func (f *fleet) release(version string) deployments.Pointer {
	f.t.Helper()
	m := deployments.Manifest{Name: "app", Version: version, Commands: deployments.Commands{Post: f.post}}
	data, err := m.Encode()
	if err != nil {
		f.t.Fatal(err)
	}
	path := filepath.Join(f.dir, version+".yaml")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return deployments.Pointer{URL: "file://" + path, Digest: sha256.Sum256(data)}
}

// start starts n agents, spread over Consul's client agents, and returns a function that waits for their end.
func (f *fleet) start(ctx context.Context, cluster *kvtest.Consul, n int) (wait func()) {
	f.t.Helper()
	states := filepath.Join(f.dir, "states")
	if err := os.Mkdir(states, 0o700); err != nil {
		f.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", states, "tmpfs", 0, "size=512m"); err != nil { // a journal that is synced costs nothing here
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := syscall.Unmount(states, syscall.MNT_DETACH); err != nil {
			f.t.Error(err)
		}
	})
	f.agents = make([]*agent.Agent, n)
	objects := object.New(object.Config{})
	acl := cluster.Client().ACL()
	var group errgroup.Group
	group.SetLimit(16)
	for i := range n {
		group.Go(func() error {
			node, name := cluster.Clients[i%len(cluster.Clients)], fmt.Sprintf("web-%03d", i)
			rules := deployments.ConsulRules("agent", deployments.RuleVars{Stage: f.id.Stage, Role: f.id.Role, Node: name}) +
				fmt.Sprintf("session %q { policy = \"write\" }\n", node.Name)
			policy, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: name, Rules: rules}, nil)
			if err != nil {
				return err
			}
			token, _, err := acl.TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
			if err != nil {
				return err
			}
			store, err := consul.Open(consul.Config{Client: node.Config(token.SecretID)})
			if err != nil {
				return err
			}
			f.t.Cleanup(func() { store.Close() })
			f.agents[i], err = agent.New(agent.Config{Store: store, Node: name, Stage: f.id.Stage, Roles: []string{f.id.Role},
				StateDir: filepath.Join(states, name), Objects: objects, Maintenance: f.maintain})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		f.t.Fatal(err)
	}
	var running sync.WaitGroup
	for _, a := range f.agents {
		running.Go(func() {
			if err := a.Run(ctx); err != nil && ctx.Err() == nil {
				f.t.Error(err)
			}
		})
	}
	return running.Wait
}

// maintain counts the agents that switch. Repeated calls, because an earlier run might have left maintenance on, don't
// count.
func (f *fleet) maintain(_ context.Context, on bool, reason string) error {
	if on {
		now := f.switching.Add(1)
		for most := f.most.Load(); now > most && !f.most.CompareAndSwap(most, now); most = f.most.Load() {
		}
	} else if f.switching.Add(-1) < 0 {
		f.switching.Add(1)
	}
	return nil
}

// on counts the agents that run a release.
func (f *fleet) on(p deployments.Pointer) (n int) {
	for _, a := range f.agents {
		if u := a.Report()[f.id.Role].Units[f.id.Unit]; u.Running == p && u.State == deployments.StateConverged {
			n++
		}
	}
	return n
}

// await waits for longer than most tests do, as the whole fleet shares this machine.
func (f *fleet) await(p deployments.Pointer, least int) {
	f.t.Helper()
	await(f.t, 3*time.Minute, fmt.Sprintf("%d nodes run %s", least, p.URL), func() error {
		if n := f.on(p); n < least {
			time.Sleep(50 * time.Millisecond) // to look takes time that the agents need
			return fmt.Errorf("%d do", n)
		}
		return nil
	})
}

// A fleet on three servers with default deny: in the middle of a rollout the leading mirror is killed, and then the
// leading server. Never do more nodes switch than allowed, and the rollout ends.
func TestFleetWithLostLeaders(t *testing.T) {
	t.Parallel()
	const size, budget = fleetSize, fleetSize / 5
	cluster := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3, Clients: []string{"c1", "c2", "c3"}, ACL: true})
	f := &fleet{t: t, id: unitID(t, "prod/web/app"), dir: t.TempDir(), post: shortCommand}
	one, two := f.release("1"), f.release("2")
	file := func(p deployments.Pointer) map[string]string {
		return map[string]string{"prod/web/app.yaml": fmt.Sprintf("release: %s\nrollout:\n  canary: 2%%\n  max_unavailable: %d\n", p, budget)}
	}
	o := gittest.New(t)
	o.Push(file(one))
	mirrors := map[string]*process{}
	for i, name := range []string{"a", "b"} {
		node := cluster.Clients[i]
		token := cluster.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: node.Name}))
		mirrors[name] = startProcess(t, name, o.Bare, node.Env(token))
	}
	m := &running{tb: t, store: cluster.Clients[2].Open(cluster.RootToken), log: &logtest.Buffer{}}

	began := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	wait := f.start(ctx, cluster, size)
	defer wait()
	defer cancel()
	f.await(one, size)
	t.Logf("%d agents run their first release after %v", size, time.Since(began).Round(time.Millisecond))

	f.most.Store(0)
	began = time.Now()
	o.Push(file(two))
	f.await(two, size/4)
	var holder string
	m.status(func(s deployments.MirrorState) bool { holder = s.Holder; return holder != "" })
	mirrors[holder].signal(t, syscall.SIGKILL)
	killed := time.Now()
	m.status(func(s deployments.MirrorState) bool { return s.Holder != holder })
	t.Logf("the mirror that led was replaced after %v", time.Since(killed).Round(time.Millisecond))
	f.await(two, size/2)
	leader := cluster.Leader()
	leader.Kill()
	f.await(two, size)
	m.record(f.id.String(), func(r deployments.Record) bool { return r.Rollout == nil && r.Stable == two })
	t.Logf("the rollout to %d nodes took %v; at most %d switched at once, %d may", size, time.Since(began).Round(time.Millisecond), f.most.Load(), budget)
	if most := f.most.Load(); most > budget || most < 2 {
		t.Errorf("%d nodes switched at once, at most %d may", most, budget)
	}
}
