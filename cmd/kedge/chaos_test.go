package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

var (
	chaosSeed     = flag.Uint64("chaos.seed", 53, "play the episode of this seed; 0: another one each time")
	chaosEvents   = flag.Int("chaos.events", 12, "how many faults and pushes an episode has")
	chaosNodes    = flag.Int("chaos.nodes", 6, "how many agents there are")
	chaosEpisodes = flag.Int("chaos.episodes", 1, "how many episodes to play, one after the other")
	chaosLogs     = flag.String("chaos.logs", "", "a directory that keeps what all processes of a failed episode logged, and the keys")
)

// TestChaos plays pushes of good and bad releases, pins, kills, restarts, processes that hang, wires that fail in four
// ways, full disks, losses of keys and restored snapshots from a printed seed, on three Consul servers, two mirrors and
// some agents, each a process. At all times every dest is whole, no more nodes are out of service than the budget
// allows, and none tries again what failed there. In the end every node runs what Git says, status tells so, and no
// process has kept descriptors, children or files.
func TestChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul, S3 and root, and takes two minutes")
	}
	t.Parallel()
	for n := range *chaosEpisodes {
		seed := *chaosSeed
		if seed == 0 {
			seed = rand.Uint64()
		}
		t.Run(fmt.Sprintf("seed %d", seed+uint64(n)), func(t *testing.T) { newChaos(t, seed+uint64(n)).play() })
	}
}

// chaos is one episode.
type chaos struct {
	*world
	t      *testing.T
	rng    *rand.Rand
	nodes  []string
	log    string // what the releases' commands append to
	began  time.Time
	budget int
	good   []string            // versions that may be live in the end; the newest is last
	n      int                 // versions so far
	wires  map[string][2]*wire // of each node, to Consul and to S3
	saved  []byte              // a snapshot of Consul's; nil: none
	faults sync.WaitGroup      // that end by themselves

	mu     sync.Mutex
	events []string
}

func newChaos(t *testing.T, seed uint64) *chaos {
	c := &chaos{t: t, rng: rand.New(rand.NewPCG(seed, 7)), budget: 2, began: time.Now(), wires: map[string][2]*wire{}}
	for i := range *chaosNodes {
		c.nodes = append(c.nodes, fmt.Sprint("n", 1+i))
	}
	c.world = newWorldOn(t, kvtest.ConsulOptions{ACL: true, Servers: 3, Clients: c.nodes})
	c.log = filepath.Join(c.dir, "commands.log")
	for _, node := range c.nodes {
		c.wires[node] = [2]*wire{
			newWire(t, strings.TrimPrefix(c.client(node).Addr, "http://")),
			newWire(t, strings.TrimPrefix(c.s3.Endpoint(), "http://")),
		}
		c.mount(node)
	}
	t.Cleanup(func() {
		if t.Failed() && *chaosLogs != "" {
			c.keepLogs(filepath.Join(*chaosLogs, fmt.Sprint(seed)))
		}
	})
	return c
}

// mount gives a node a small disk of its own, for its releases and its state.
func (c *chaos) mount(node string) {
	disk := filepath.Join(c.dir, node)
	if err := os.MkdirAll(disk, 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m"); err != nil {
		c.t.Fatalf("a disk for %s, for which this test needs root: %v", node, err)
	}
	c.t.Cleanup(func() {
		if p := c.processOf(node); p != nil {
			p.kill()
		}
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			c.t.Errorf("unmount the disk of %s: %v", node, err)
		}
	})
}

// startAgent starts the agent of a node, behind the node's wires.
func (c *chaos) startAgent(node string) {
	w := c.wires[node]
	c.startAgentWith(node, []string{"CONSUL_HTTP_ADDR=http://" + w[0].addr, "AWS_ENDPOINT_URL_S3=http://" + w[1].addr})
}

// keepLogs writes to dir what happened, what each process logged, and every key, for a failure that is seldom seen
// twice.
func (c *chaos) keepLogs(dir string) {
	c.mu.Lock()
	files := map[string]string{"events": strings.Join(c.events, "\n") + "\n"}
	c.mu.Unlock()
	c.world.mu.Lock()
	for _, p := range c.started {
		files[p.name+".log"] += p.logged()
	}
	c.world.mu.Unlock()
	pairs, _, err := c.anyClient().KV().List("kedge/", nil)
	keys := &strings.Builder{}
	fmt.Fprintf(keys, "error: %v\n", err)
	for _, p := range pairs {
		fmt.Fprintf(keys, "%s (%d)\n%s\n", p.Key, p.ModifyIndex, p.Value)
	}
	files["keys"] = keys.String()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		c.t.Error(err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			c.t.Error(err)
		}
	}
}

func (c *chaos) say(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, time.Now().UTC().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (c *chaos) play() {
	defer func() {
		if c.t.Failed() {
			c.mu.Lock()
			defer c.mu.Unlock()
			commands, _ := os.ReadFile(c.log)
			c.t.Logf("events:\n%s\ncommands:\n%s", strings.Join(c.events, "\n"), commands)
		}
	}()
	for _, name := range []string{"mirror-1", "mirror-2"} {
		c.startMirror(name)
	}
	for _, node := range c.nodes {
		c.startAgent(node)
	}
	c.token("operator", deployments.RuleVars{}) // also of any snapshot
	c.deploy(true)
	c.live("app", c.good[0], c.nodes...)
	c.eventually("all report", func() error { return c.settled() })
	descriptors := c.descriptors()

	ctx, cancel := context.WithCancel(c.t.Context())
	var dests []string
	for _, node := range c.nodes {
		dests = append(dests, filepath.Join(c.srv(node), "app"))
	}
	reads := c.reader(ctx, dests...)
	var watching sync.WaitGroup
	watching.Go(func() { c.watchBudget(ctx) })
	watching.Go(func() { c.watchVerdicts(ctx) })
	for range *chaosEvents {
		c.event()
		if c.t.Failed() {
			break
		}
		time.Sleep(time.Duration(c.rng.IntN(2500)) * time.Millisecond)
	}
	c.faults.Wait()
	c.end()
	cancel()
	watching.Wait()
	c.leftBehind(descriptors)
	c.t.Logf("%d events, %d versions, %d reads of a whole tree, in %v", *chaosEvents, c.n, reads(), time.Since(c.began).Round(time.Second))
}

// deploy pushes the next release, which is good or fails in its post command.
func (c *chaos) deploy(good bool) {
	c.n++
	version := fmt.Sprint(c.n)
	say := func(what string) deployments.Command {
		return deployments.Command{Run: fmt.Sprintf("echo %s $(basename $(dirname {{ must_env `SRV` }})) %s >> %s", what, version, c.log)}
	}
	post := deployments.Command{Run: "sleep 0.3"}
	if !good {
		post.Run = "sleep 0.3; exit 1"
	}
	p := c.publish("app", version, func(o *artifact.PublishOptions) {
		o.Manifest.Commands.Pre = []deployments.Command{say("begin")}
		o.Manifest.Commands.Post = []deployments.Command{post, say("post")}
		o.Manifest.Commands.Success = []deployments.Command{say("end")}
		o.Manifest.Commands.Failure = []deployments.Command{say("fail")}
	})
	file := fmt.Sprintf("release: %s\nrollout:\n  canary: 1\n  bake: 500ms\n  max_unavailable: %d\n  max_failures: 0\n  deadline: 30s\n", p, c.budget)
	c.say("push %s, good: %v", version, good)
	c.push("release "+version, map[string]*string{webApp.String(): &file})
	if good {
		c.good = append(c.good, version)
	}
}

func (c *chaos) event() {
	node := c.nodes[c.rng.IntN(len(c.nodes))]
	switch c.rng.IntN(18) {
	case 0, 1, 2:
		c.deploy(true)
	case 3, 4:
		c.deploy(false)
	case 5:
		c.say("kill the agent of %s, and start it again", node)
		c.processOf(node).kill()
		c.pause(2000)
		c.startAgent(node)
	case 6:
		c.say("restart the agent of %s", node)
		c.stop(node)
		c.startAgent(node)
	case 7:
		some := 2 + c.rng.IntN(len(c.nodes)-1)
		c.say("restart %d agents at once", some)
		var wg sync.WaitGroup
		for _, i := range c.rng.Perm(len(c.nodes))[:some] {
			wg.Go(func() { c.stop(c.nodes[i]) })
			defer c.startAgent(c.nodes[i])
		}
		wg.Wait()
	case 8:
		name := fmt.Sprint("mirror-", 1+c.rng.IntN(2))
		c.say("kill %s, and start it again", name)
		c.processOf(name).kill()
		c.pause(1000)
		c.startMirror(name)
	case 9:
		i := c.rng.IntN(len(c.consul.Servers))
		c.say("kill Consul server %d, and start it again", i+1)
		c.consul.Servers[i].Kill()
		c.pause(3000)
		c.consul.Servers[i].Start()
		c.consul.WaitReady()
	case 10:
		prefix := []string{"kedge/status/", "kedge/status/prod/web/", "kedge/pins/prod/web/", "kedge/"}[c.rng.IntN(4)]
		c.say("delete all keys below %s", prefix)
		if _, err := c.anyClient().KV().DeleteTree(prefix, nil); err != nil {
			c.say("could not: %v", err)
		}
	case 11, 12:
		to := c.rng.IntN(2)
		fault := []wireFault{wireSilent, wireDeaf, wireTorn}[c.rng.IntN(3)]
		c.say("the wire of %s to %s is %s", node, [...]string{"Consul", "S3"}[to], fault)
		w := c.wires[node][to]
		w.set(fault)
		c.later(4000, func() { w.set(wireWhole) })
	case 13:
		names := append([]string{"mirror-1", "mirror-2"}, c.nodes...)
		name := names[c.rng.IntN(len(names))]
		c.say("%s hangs", name)
		p := c.processOf(name)
		p.cmd.Process.Signal(syscall.SIGSTOP)
		c.later(4000, func() { p.cmd.Process.Signal(syscall.SIGCONT) })
	case 14:
		version := c.good[c.rng.IntN(len(c.good))]
		_, stderr, code := c.kedge("pin", webApp.String(), version, "--reason", "chaos")
		c.say("pin %s: %d %s", version, code, stderr)
	case 15:
		_, stderr, code := c.kedge("unpin", webApp.String())
		c.say("unpin: %d %s", code, stderr)
	case 16:
		c.consul.WaitReady()
		if c.saved == nil {
			c.say("save a snapshot")
			c.saved = c.snapshot()
			break
		}
		c.say("restore the snapshot: %v", c.anyClient().Snapshot().Restore(nil, bytes.NewReader(c.saved)))
		c.saved = nil
		c.consul.WaitReady()
	case 17:
		c.say("the disk of %s is full", node)
		ballast := filepath.Join(c.dir, node, "ballast")
		if err := fill(ballast); err != nil {
			c.t.Error(err)
		}
		c.later(3000, func() { os.Remove(ballast) })
	}
}

// snapshot saves one of Consul's; nil: on a busy machine its servers were electing a leader.
func (c *chaos) snapshot() []byte {
	r, _, err := c.anyClient().Snapshot().Save(nil)
	if err != nil {
		c.say("could not: %v", err)
		return nil
	}
	defer r.Close()
	saved, err := io.ReadAll(r)
	if err != nil {
		c.say("could not: %v", err)
		return nil
	}
	return saved
}

// pause waits for up to most milliseconds.
func (c *chaos) pause(most int) { time.Sleep(time.Duration(c.rng.IntN(most)) * time.Millisecond) }

// later ends a fault after up to most milliseconds, while the episode goes on.
func (c *chaos) later(most int, ends func()) {
	after := time.Duration(c.rng.IntN(most)) * time.Millisecond
	c.faults.Go(func() {
		time.Sleep(after)
		ends()
	})
}

// fill writes a file until its disk is full.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	defer f.Close()
	for block := make([]byte, 64<<10); len(block) > 0; block = block[:len(block)/2] {
		for err = nil; err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			return err
		}
	}
	return nil
}

// stop ends an agent as systemd would. One that was started a moment ago has yet to ask for signals, and is ended by
// this one.
func (c *chaos) stop(node string) {
	err := c.processOf(node).stop()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
		return
	}
	if err != nil {
		c.t.Errorf("%s: %v", node, err)
	}
}

func (c *chaos) processOf(name string) *process {
	c.world.mu.Lock()
	defer c.world.mu.Unlock()
	return c.processes[name]
}

// anyClient is of a server that runs.
func (c *chaos) anyClient() *api.Client {
	i := slices.IndexFunc(c.consul.Servers, (*kvtest.ConsulNode).Running)
	return c.consul.Servers[max(i, 0)].Client(c.consul.RootToken) // the first, if all are being started again
}

// settled is nil once every node's report says that it is where it is to stay.
func (c *chaos) settled() error {
	for _, node := range c.nodes {
		entry, err := c.store.Get(c.t.Context(), kv.StatusKey("prod", "web", node))
		if err != nil {
			return err
		}
		r, err := deployments.ParseReport(entry.Value)
		if err != nil {
			return err
		}
		if u := r.Units["app"]; entry.Session == "" || u.State != deployments.StateConverged {
			return fmt.Errorf("%s: gone %v, %s, runs %s, wants %s: %s", node, entry.Session == "", u.State, u.Version, u.Want.Digest.Short(), u.Error)
		}
	}
	return nil
}

// watchBudget follows what the releases' commands say: a node is out of service from its pre command on until it
// succeeded, or is back.
func (c *chaos) watchBudget(ctx context.Context) {
	f, err := os.Open(c.log)
	if err != nil {
		c.t.Error(err)
		return
	}
	defer f.Close()
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		c.t.Error(err)
		return
	}
	lines := bufio.NewReader(f)
	out, failed := map[string]string{}, map[string]bool{}
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			if ctx.Err() != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
			continue
		}
		if err != nil {
			c.t.Error(err)
			return
		}
		var what, node, version string
		if _, err := fmt.Sscan(line, &what, &node, &version); err != nil {
			c.t.Errorf("the commands say %q", line)
			continue
		}
		if what == "post" {
			if out[node] != version { // taken back before its switch, to this one: nothing else tells
				delete(out, node)
			}
			continue
		}
		c.say("  %s %s %s", node, what, version)
		if what != "begin" {
			delete(out, node)
			failed[node+" "+version] = what == "fail"
			continue
		}
		if failed[node+" "+version] { // each version is asked for once
			c.t.Errorf("%s tries %s again, which failed there", node, version)
		}
		out[node] = version
		if len(out) > c.budget {
			c.t.Errorf("at %s %d nodes are out of service, %d may: %v", time.Now().UTC().Format("15:04:05.000"), len(out), c.budget, out)
		}
	}
}

// watchVerdicts follows why rollouts went back: never because of a node that says that it converged.
func (c *chaos) watchVerdicts(ctx context.Context) {
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		e, _, err := c.anyClient().KV().Get("kedge/"+kv.DesiredKey(webApp),
			(&api.QueryOptions{AllowStale: true}).WithContext(ctx))
		if err != nil || e == nil {
			continue // a server was killed, or the record is lost
		}
		r, err := deployments.ParseRecord(e.Value)
		if err != nil {
			c.t.Errorf("the record doesn't parse: %v: %s", err, e.Value)
			return
		}
		if p := r.Rollout; p != nil && p.Facts["cause"] == string(deployments.ReasonNotInTime) &&
			strings.HasPrefix(p.Facts["error"], string(deployments.StateConverged)) {
			c.t.Errorf("release %s went back as %s was late, which had converged: %v", r.Target, p.Facts["node"], p.Facts)
			return
		}
	}
}

// end takes a pin away, pushes a good release, and waits for all to be where Git says, and for status to tell so.
func (c *chaos) end() {
	for name, p := range c.processes {
		select {
		case <-p.done:
			c.t.Errorf("%s has ended by itself: %v", name, p.err)
		default:
		}
	}
	c.kedge("unpin", webApp.String())
	c.deploy(true)
	last := c.good[len(c.good)-1]
	began := time.Now()
	c.live("app", last, c.nodes...)
	c.eventually("all converge", c.settled)
	took := time.Since(began).Round(100 * time.Millisecond)
	c.say("converged on %s after %v", last, took)
	c.t.Logf("converged %v after the last push", took)
	c.eventually("status tells it", func() error {
		stdout, stderr, code := c.kedge("status", "--json")
		var told struct {
			Units []struct {
				Nodes []struct {
					Node   string
					Report deployments.UnitReport
				}
			}
		}
		if err := json.Unmarshal([]byte(stdout), &told); err != nil {
			return fmt.Errorf("exit %d: %s: %w", code, stderr, err)
		}
		if len(told.Units) != 1 || len(told.Units[0].Nodes) != len(c.nodes) {
			return fmt.Errorf("status tells %s", stdout)
		}
		for _, n := range told.Units[0].Nodes {
			if u := n.Report; u.State != deployments.StateConverged || u.Version != last {
				return fmt.Errorf("status tells of %s: %s, runs %s", n.Node, u.State, u.Version)
			}
		}
		return nil
	})
}

// descriptors counts each process's open files.
func (c *chaos) descriptors() map[string]int {
	counts := map[string]int{}
	for name, p := range c.processes {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
		if err != nil {
			c.t.Error(err)
		}
		counts[name] = len(open)
	}
	return counts
}

// leftBehind checks that processes have no more descriptors than at the start, but for connections that a wire has lost
// and that are about to be given up; no children; and that nothing half made lies around.
func (c *chaos) leftBehind(before map[string]int) {
	const given = 24
	for name, n := range c.descriptors() {
		if n > before[name]+given {
			c.t.Errorf("%s has %d open files, %d at its start", name, n, before[name])
		}
	}
	for name, p := range c.processes {
		pid := p.cmd.Process.Pid
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil || len(children) > 0 {
			c.t.Errorf("%s has children %q: %v", name, children, err)
		}
	}
	for _, node := range c.nodes {
		c.eventually("nothing half made is left on "+node, func() error {
			var left []string
			err := filepath.WalkDir(filepath.Join(c.dir, node), func(path string, _ os.DirEntry, err error) error {
				name := filepath.Base(path)
				if strings.HasPrefix(name, "staging-") || strings.HasPrefix(name, ".") && strings.Contains(name, ".json") {
					left = append(left, path)
				}
				return err
			})
			if len(left) > 0 {
				return fmt.Errorf("%q", left)
			}
			return err
		})
	}
}
