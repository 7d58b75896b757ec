package mirror

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
	"kedge/sync/agent"
	"kedge/sync/git/gittest"
)

var nodesOfFleet = flag.Int("nodes", 20, "how many agents TestFleetAtSize starts")

// agentsOrder configures a process of many agents, as JSON in KEDGE_TEST_AGENTS.
type agentsOrder struct {
	Consul []string // addresses of client agents, which the agents take by turns
	Root   string   // the token that makes theirs
	Unit   deployments.UnitID
	States string // where their state directories are made
	From   int
	To     int
}

// agentsCount has the counters of such a process, which prints them for every line on its stdin.
type agentsCount struct {
	Started int
	Live    map[string]int         // agents that run a release, by its pointer
	Decided map[string][]time.Time // when each agent first decided on a release, by its pointer
	Reports float64                // written
	Said    map[string]int         // the reports by what they say
	Turns   float64                // decisions made anew, of all units
	Views   int64                  // of a watched prefix: what woke an agent
}

// agentsProcess runs real agents, each with its own store, token and state directory, until stdin ends.
func agentsProcess() error {
	var order agentsOrder
	if err := json.Unmarshal([]byte(os.Getenv("KEDGE_TEST_AGENTS")), &order); err != nil {
		return err
	}
	root, err := api.NewClient(&api.Config{Address: order.Consul[0], Token: order.Root})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	seen := &agentsLog{live: map[string]int{}, decided: map[string][]time.Time{}}
	metrics := make([]*prometheus.Registry, order.To-order.From)
	said := &reportsSaid{counts: map[string]int{}}
	var views, started atomic.Int64
	var agents sync.WaitGroup
	var making errgroup.Group
	making.SetLimit(8)
	objects := object.New(object.Config{})
	start := func(i, attempt int) error {
		name := fmt.Sprintf("web-%05d", order.From+i)
		address := order.Consul[(order.From+i)%len(order.Consul)]
		host, err := api.NewClient(&api.Config{Address: address, Token: order.Root})
		if err != nil {
			return err
		}
		self, err := host.Agent().NodeName()
		if err != nil {
			return err
		}
		rules := deployments.ConsulRules("agent", deployments.RuleVars{
			Stage: order.Unit.Stage, Role: order.Unit.Role, Node: name,
		}) + fmt.Sprintf("session %q { policy = \"write\" }\n", self)
		// A policy whose creation gave no answer may exist: no two attempts use one name.
		unique := fmt.Sprintf("%s-%d", name, attempt)
		policy, _, err := root.ACL().PolicyCreate(&api.ACLPolicy{Name: unique, Rules: rules}, nil)
		if err != nil {
			return err
		}
		token, _, err := root.ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
		if err != nil {
			return err
		}
		store, err := consul.Open(consul.Config{Client: &api.Config{Address: address, Token: token.SecretID}})
		if err != nil {
			return err
		}
		metrics[i] = prometheus.NewRegistry()
		a, err := agent.New(agent.Config{
			Store: countedStore{store, &views, said}, Node: name, Stage: order.Unit.Stage, Roles: []string{order.Unit.Role},
			StateDir: filepath.Join(order.States, name), Objects: objects, Metrics: metrics[i],
			Log: slog.New(&agentLog{all: seen, decided: map[string]bool{}}),
		})
		if err != nil {
			return err
		}
		started.Add(1)
		agents.Go(func() {
			if err := a.Run(ctx); err != nil && ctx.Err() == nil {
				fmt.Fprintln(os.Stderr, name, err)
			}
		})
		return nil
	}
	for i := range metrics {
		making.Go(func() error {
			// Servers that are busy with a fleet that boots refuse some requests for tokens.
			const attempts = 10
			for attempt := 1; ; attempt++ {
				err := start(i, attempt)
				if err == nil {
					return nil
				}
				fmt.Fprintf(os.Stderr, "agent %d, attempt %d: %v\n", order.From+i, attempt, err)
				if attempt == attempts {
					return err
				}
				if wait.For(ctx, time.Second) != nil {
					return nil
				}
			}
		})
	}
	made := make(chan error, 1)
	go func() { made <- making.Wait() }()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		count := seen.count()
		count.Started, count.Views, count.Said = int(started.Load()), views.Load(), said.read()
		if count.Started == len(metrics) {
			count.Reports, count.Turns = agentsMetrics(metrics)
		}
		if err := json.NewEncoder(os.Stdout).Encode(count); err != nil {
			return err
		}
	}
	cancel()
	agents.Wait()
	return <-made
}

// agentsMetrics returns the sums of the agents' metrics for reports and decisions.
func agentsMetrics(registries []*prometheus.Registry) (reports, turns float64) {
	for _, r := range registries {
		families, _ := r.Gather()
		for _, f := range families {
			switch f.GetName() {
			case "kedge_agent_reports_total":
				reports += f.Metric[0].GetCounter().GetValue()
			case "kedge_agent_reconcile_duration_seconds":
				turns += float64(f.Metric[0].GetHistogram().GetSampleCount())
			}
		}
	}
	return reports, turns
}

// countedStore counts the views of its watches, and the reports that are written to it.
type countedStore struct {
	kv.Store
	views *atomic.Int64
	said  *reportsSaid
}

func (s countedStore) Presence(ctx context.Context, name string) (kv.Presence, error) {
	p, err := s.Store.Presence(ctx, name)
	return countedPresence{p, s.said}, err
}

// countedPresence counts the reports that it writes.
type countedPresence struct {
	kv.Presence
	said *reportsSaid
}

func (p countedPresence) Put(ctx context.Context, key string, value []byte) error {
	err := p.Presence.Put(ctx, key, value)
	if err == nil {
		p.said.add(value)
	}
	return err
}

func (p countedPresence) Join(ctx context.Context, key string, value []byte) (uint64, <-chan struct{}, error) {
	since, lost, err := p.Presence.Join(ctx, key, value)
	if err == nil {
		p.said.add(value)
	}
	return since, lost, err
}

// reportsSaid counts reports by what they say.
type reportsSaid struct {
	mu     sync.Mutex
	counts map[string]int
}

func (s *reportsSaid) add(value []byte) {
	r, err := deployments.ParseReport(value)
	if err != nil {
		return
	}
	what := "no unit"
	for _, u := range r.Units { // the fleet has one
		what = string(u.State)
		if u.Pinned {
			what += ", pinned"
		}
		if u.Running.Digest != u.Want.Digest {
			what += ", to switch"
		}
	}
	if !r.Ready {
		what += ", not ready"
	}
	if r.Joined == 0 {
		what += ", joining"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

func (s *reportsSaid) read() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

func (s countedStore) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	return s.Store.Watch(ctx, prefix, func(v kv.View) { s.views.Add(1); f(v) })
}

// agentsLog has what all agents of a process have logged of decisions and releases.
type agentsLog struct {
	mu      sync.Mutex
	live    map[string]int
	decided map[string][]time.Time
}

func (l *agentsLog) count() agentsCount {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := agentsCount{Live: map[string]int{}, Decided: map[string][]time.Time{}}
	for p, n := range l.live {
		c.Live[p] = n
	}
	for p, times := range l.decided {
		c.Decided[p] = slices.Clone(times)
	}
	return c
}

// agentLog is the log of one agent. Of its messages it keeps when the agent decided on a release, and what it runs.
type agentLog struct {
	all     *agentsLog
	decided map[string]bool // under all.mu
	live    string          // under all.mu
}

func (l *agentLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }
func (l *agentLog) WithAttrs([]slog.Attr) slog.Handler               { return l }
func (l *agentLog) WithGroup(string) slog.Handler                    { return l }

func (l *agentLog) Handle(_ context.Context, r slog.Record) error {
	attrs := map[string]string{}
	r.Attrs(func(a slog.Attr) bool { attrs[a.Key] = a.Value.String(); return true })
	l.all.mu.Lock()
	defer l.all.mu.Unlock()
	switch p := attrs["target"]; {
	case r.Message == "decided what the unit should run" && p != "" && !l.decided[p]:
		l.decided[p] = true
		l.all.decided[p] = append(l.all.decided[p], r.Time)
	case r.Message == "the release is live and healthy" && attrs["release"] != l.live:
		if l.live != "" {
			l.all.live[l.live]--
		}
		l.live = attrs["release"]
		l.all.live[l.live]++
	}
	return nil
}

// agentsChild is a process of many agents.
type agentsChild struct {
	*exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

// startAgents starts size agents, in as many processes as the limit of open files requires.
func startAgents(t *testing.T, cluster *kvtest.Consul, id deployments.UnitID, size int) (children []*agentsChild) {
	t.Helper()
	states := filepath.Join(t.TempDir(), "states")
	if err := os.Mkdir(states, 0o700); err != nil {
		t.Fatal(err)
	}
	// On tmpfs, syncing a journal costs nothing.
	if err := syscall.Mount("tmpfs", states, "tmpfs", 0, fmt.Sprintf("size=%dm", 256+size/4)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(states, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	const filesAnAgent = 16 // at most, with what its store keeps open
	each := max(1, min(size, int(min(limit.Cur, 1<<20))/filesAnAgent))
	var addresses []string
	for _, n := range cluster.Clients {
		addresses = append(addresses, n.Addr)
	}
	for from := 0; from < size; from += each {
		order, err := json.Marshal(agentsOrder{Consul: addresses, Root: cluster.RootToken, Unit: id, States: states,
			From: from, To: min(size, from+each)})
		if err != nil {
			t.Fatal(err)
		}
		c := &agentsChild{Cmd: exec.Command(os.Args[0])}
		c.Env = append(os.Environ(), "KEDGE_TEST_AS=agents", "KEDGE_TEST_AGENTS="+string(order))
		c.Stderr = os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if c.in, err = c.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		c.out = json.NewDecoder(out)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			c.Process.Kill()
			c.Wait()
		})
		children = append(children, c)
	}
	return children
}

// counted returns the sum of all processes' counters.
func counted(t *testing.T, children []*agentsChild) agentsCount {
	t.Helper()
	sum := agentsCount{Live: map[string]int{}, Decided: map[string][]time.Time{}, Said: map[string]int{}}
	for _, c := range children {
		var one agentsCount
		_, err := io.WriteString(c.in, "\n")
		if err == nil {
			err = c.out.Decode(&one)
		}
		if err != nil {
			t.Fatalf("asking a process of agents: %v", err)
		}
		sum.Started, sum.Views = sum.Started+one.Started, sum.Views+one.Views
		sum.Reports, sum.Turns = sum.Reports+one.Reports, sum.Turns+one.Turns
		for p, n := range one.Live {
			sum.Live[p] += n
		}
		for what, n := range one.Said {
			sum.Said[what] += n
		}
		for p, times := range one.Decided {
			sum.Decided[p] = append(sum.Decided[p], times...)
		}
	}
	return sum
}

// usage is what a group of processes has used so far.
type usage struct {
	cpu time.Duration
	rss int // MB
}

func usageOf(t *testing.T, pids ...int) (u usage) {
	t.Helper()
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		// After the name in parentheses: utime and stime are fields 14 and 15, rss is 24 (proc_pid_stat(5)).
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		number := func(field int) int {
			n, err := strconv.Atoi(fields[field-3])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
		u.cpu += time.Duration(number(14)+number(15)) * tick
		u.rss += number(24) * os.Getpagesize() >> 20
	}
	return u
}

// fleetMeter measures a phase of the bench.
type fleetMeter struct {
	t        *testing.T
	size     int
	cluster  *kvtest.Consul
	mirror   *process
	children []*agentsChild

	began  time.Time
	before agentsCount
	used   map[string]usage
	raft   uint64
}

func (m *fleetMeter) usage() map[string]usage {
	var servers, agents []int
	for _, n := range m.cluster.Servers {
		servers = append(servers, n.PID())
	}
	for _, c := range m.children {
		agents = append(agents, c.Process.Pid)
	}
	return map[string]usage{
		"servers": usageOf(m.t, servers...), "mirror": usageOf(m.t, m.mirror.Process.Pid), "agents": usageOf(m.t, agents...),
	}
}

// raftIndex returns the number of entries in the servers' log: every write of any kind is one.
func (m *fleetMeter) raftIndex() uint64 {
	self, err := m.cluster.Leader().Client(m.cluster.RootToken).Agent().Self()
	if err != nil {
		m.t.Fatal(err)
	}
	raft, _ := self["Stats"]["raft"].(map[string]any)
	text, _ := raft["last_log_index"].(string)
	index, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		m.t.Fatalf("the leader's raft statistics: %v: %v", raft, err)
	}
	return index
}

func (m *fleetMeter) start() {
	m.before, m.used, m.raft = counted(m.t, m.children), m.usage(), m.raftIndex()
	m.began = time.Now()
}

// phase is what one phase used.
type phase struct {
	took                  time.Duration
	writes                uint64  // in the servers' log
	reports, turns, views float64 // a node
	cpu                   map[string]time.Duration
}

// stop logs what the phase used.
func (m *fleetMeter) stop(what string) phase {
	m.t.Helper()
	p := phase{took: time.Since(m.began), writes: m.raftIndex() - m.raft, cpu: map[string]time.Duration{}}
	after, used := counted(m.t, m.children), m.usage()
	size := float64(m.size)
	p.reports, p.turns = (after.Reports-m.before.Reports)/size, (after.Turns-m.before.Turns)/size
	p.views = float64(after.Views-m.before.Views) / size
	text := fmt.Sprintf("%s: %v; %d writes; a node: %.2f reports, %.1f views, %.1f turns; CPU, memory:",
		what, p.took.Round(time.Millisecond), p.writes, p.reports, p.views, p.turns)
	for _, who := range []string{"servers", "mirror", "agents"} {
		p.cpu[who] = used[who].cpu - m.used[who].cpu
		text += fmt.Sprintf(" %s %v (%.1f%% of a core) %d MB", who, p.cpu[who], 100*p.cpu[who].Seconds()/p.took.Seconds(),
			used[who].rss)
	}
	m.t.Log(text)
	m.said(m.before, after)
	return p
}

// said logs what the reports between two counts said.
func (m *fleetMeter) said(before, after agentsCount) {
	m.t.Helper()
	for _, what := range slices.Sorted(maps.Keys(after.Said)) {
		if n := after.Said[what] - before.Said[what]; n > 0 {
			m.t.Logf("  %.2f reports a node: %s", float64(n)/float64(m.size), what)
		}
	}
}

// live waits until all agents run a release.
func (m *fleetMeter) live(p deployments.Pointer) {
	m.t.Helper()
	const progressEvery = 10 * time.Second
	began, said := time.Now(), time.Now()
	await(m.t, 2*time.Minute+time.Duration(m.size)*200*time.Millisecond, "all run "+p.URL, func() error {
		now := counted(m.t, m.children)
		n := now.Live[p.String()]
		if n == m.size {
			return nil
		}
		if time.Since(said) > progressEvery {
			said = time.Now()
			m.t.Logf("  after %v: %d agents started, %d run %s, %d reports", time.Since(began).Round(time.Second),
				now.Started, n, p.URL, int(now.Reports))
		}
		time.Sleep(100 * time.Millisecond) // to count takes time that the agents need
		return fmt.Errorf("%d of %d do", n, m.size)
	})
}

// asShipped gives Consul the timing of its defaults again, which kvtest shortens so that deaths are noticed soon. A
// fleet that boots on one machine stalls servers for longer than that, and they would lose their leader.
const asShipped = `
performance { raft_multiplier = 5 }
gossip_lan {
	gossip_interval = "200ms"
	probe_interval  = "1s"
	probe_timeout   = "500ms"
	suspicion_mult  = 4
}`

// A fleet of real agents on three servers that deny by default, at the size that -nodes says: boots, follows pins
// that don't wait for the budget, goes through a rollout by 5 %, and then does nothing. It prints what each takes.
func TestFleetAtSize(t *testing.T) {
	t.Parallel()
	size := *nodesOfFleet
	id := unitID(t, "prod/web/app")
	clients := []string{"c1", "c2", "c3"}
	for n := len(clients); n*2000 < size; n = len(clients) {
		clients = append(clients, fmt.Sprintf("c%d", n+1))
	}
	cluster := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3, Clients: clients, ACL: true, Config: asShipped})
	f := &fleet{t: t, id: id, dir: t.TempDir()}
	one, two, three := f.release("1"), f.release("2"), f.release("3")
	file := func(p deployments.Pointer) map[string]string {
		return map[string]string{"prod/web/app.yaml": fmt.Sprintf("release: %s\nrollout: {max_unavailable: 5%%}\n", p)}
	}
	o := gittest.New(t)
	o.Push(file(one))
	node := cluster.Clients[0]
	token := cluster.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: node.Name}))
	m := &fleetMeter{t: t, size: size, cluster: cluster, mirror: startProcess(t, "a", o.Bare, node.Env(token))}
	store := cluster.Open(cluster.RootToken)
	r := &running{tb: t, store: store, log: &logtest.Buffer{}}
	r.record(id.String(), func(r deployments.Record) bool { return r.Target == one })

	began, entries := time.Now(), m.raftIndex()
	m.children = startAgents(t, cluster, id, size)
	m.live(one)
	boot := counted(t, m.children)
	t.Logf("%d agents in %d processes: all run their first release after %v; a node: %.2f reports, %.2f writes, of which "+
		"2 make its policy and token", size, len(m.children), time.Since(began).Round(time.Millisecond),
		boot.Reports/float64(size), float64(m.raftIndex()-entries)/float64(size))
	m.said(agentsCount{}, boot)

	pin := func(p deployments.Pointer) {
		t.Helper()
		m.start()
		value := fmt.Sprintf(`{"release":%q,"at_once":true}`, p)
		if err := store.Commit(t.Context(), nil, kv.Put(kv.PinKey(id), []byte(value))); err != nil {
			t.Fatal(err)
		}
		m.live(p)
		decided := counted(t, m.children).Decided[p.String()]
		slices.SortFunc(decided, time.Time.Compare)
		if len(decided) != size {
			t.Fatalf("%d agents decided, want %d", len(decided), size)
		}
		after := func(part float64) time.Duration {
			return decided[int(part*float64(size-1))].Sub(m.began).Round(100 * time.Microsecond)
		}
		took := m.stop("a pin, until all run it")
		t.Logf("from the pin's write to a node's decision: median %v, p99 %v, last %v", after(.5), after(.99), after(1))
		if took.reports > 4 { // on a busy machine a switch takes long enough for more than two
			t.Errorf("a node wrote %.2f reports for one switch, want at most 4", took.reports)
		}
	}
	reports := boot.Reports
	await(t, time.Minute, "the reports of the boot are written", func() error {
		was := reports
		time.Sleep(time.Second)
		if reports = counted(t, m.children).Reports; reports != was {
			return fmt.Errorf("%v have been, %v a second ago", reports, was)
		}
		return nil
	})
	pin(two)
	m.start()
	if err := store.Commit(t.Context(), nil, kv.Delete(kv.PinKey(id))); err != nil {
		t.Fatal(err)
	}
	m.live(one)
	r.record(id.String(), func(r deployments.Record) bool { return r.Rollout == nil })
	m.stop("the pin's end, by 5 %")

	m.start()
	o.Push(file(three))
	m.live(three)
	await(t, 2*time.Minute, "the rollout ends", func() error {
		e, err := store.Get(t.Context(), kv.DesiredKey(id))
		if err != nil {
			return err
		}
		record, err := deployments.ParseRecord(e.Value)
		if err == nil && (record.Rollout != nil || record.Stable != three) {
			err = fmt.Errorf("the record is %s", e.Value)
		}
		return err
	})
	rollout := m.stop("a rollout by 5 %")
	if rollout.reports > 3 {
		t.Errorf("a node wrote %.2f reports in a rollout, want at most 3", rollout.reports)
	}

	m.start()
	time.Sleep(5 * time.Second) // what idleness costs is measured by the time that it lasts
	idle := m.stop("nothing to do")
	if idle.turns > 3 { // the rollout's last write may be seen late, but who decides by the clock does so more often
		t.Errorf("a node decided %.1f times where nothing had changed", idle.turns)
	}
}
