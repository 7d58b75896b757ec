package main

import (
	"bufio"
	"context"
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

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

var (
	// By itself an episode is played that has every fault but an agent that is killed: one that is in the moment between
	// the first step of its switch and its report of that isn't counted by the mirror yet.
	chaosSeed     = flag.Uint64("chaos.seed", 12, "play the episode of this seed; 0: another one each time")
	chaosEvents   = flag.Int("chaos.events", 12, "how many faults and pushes an episode has")
	chaosEpisodes = flag.Int("chaos.episodes", 1, "how many episodes to play, one after the other")
	chaosLogs     = flag.String("chaos.logs", "", "a directory that keeps what all processes of a failed episode logged, and the keys")
)

// TestChaos plays pushes of good and bad releases, kills, restarts and losses of keys from a printed seed, on three
// Consul servers, two mirrors and six agents, each a process. At all times every dest is whole and no more nodes
// are out of service than the budget allows; in the end every node runs what Git says, or what it went back to.
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
	good   []string // versions that may be live in the end; the newest is last
	n      int      // versions so far

	mu     sync.Mutex
	events []string
}

func newChaos(t *testing.T, seed uint64) *chaos {
	nodes := []string{"n1", "n2", "n3", "n4", "n5", "n6"}
	c := &chaos{t: t, rng: rand.New(rand.NewPCG(seed, 7)), nodes: nodes, budget: 2, began: time.Now()}
	c.world = newWorldOn(t, kvtest.ConsulOptions{ACL: true, Servers: 3, Clients: nodes})
	c.log = filepath.Join(c.dir, "commands.log")
	t.Cleanup(func() {
		if t.Failed() && *chaosLogs != "" {
			c.keepLogs(filepath.Join(*chaosLogs, fmt.Sprint(seed)))
		}
	})
	return c
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
	c.deploy(true)
	c.live("app", c.good[0], c.nodes...)
	c.eventually("all report", func() error { return c.settled() })

	ctx, cancel := context.WithCancel(c.t.Context())
	var dests []string
	for _, node := range c.nodes {
		dests = append(dests, filepath.Join(c.srv(node), "app"))
	}
	reads := c.reader(ctx, dests...)
	var watching sync.WaitGroup
	watching.Go(func() { c.watchBudget(ctx) })
	for range *chaosEvents {
		c.event()
		if c.t.Failed() {
			break
		}
		time.Sleep(time.Duration(c.rng.IntN(2500)) * time.Millisecond)
	}
	c.end()
	cancel()
	watching.Wait()
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
		o.Manifest.Commands.Post = []deployments.Command{post}
		o.Manifest.Commands.Success = []deployments.Command{say("end")}
		o.Manifest.Commands.Failure = []deployments.Command{say("end")}
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
	switch c.rng.IntN(9) {
	case 0, 1:
		c.deploy(true)
	case 2:
		c.deploy(false)
	case 3:
		c.say("kill the agent of %s, and start it again", node)
		c.processes[node].kill()
		time.Sleep(time.Duration(c.rng.IntN(2000)) * time.Millisecond)
		c.startAgent(node)
	case 4:
		c.say("restart the agent of %s", node)
		c.stop(node)
		c.startAgent(node)
	case 5:
		some := 2 + c.rng.IntN(len(c.nodes)-1)
		c.say("restart %d agents at once", some)
		var wg sync.WaitGroup
		for _, i := range c.rng.Perm(len(c.nodes))[:some] {
			wg.Go(func() { c.stop(c.nodes[i]) })
			defer c.startAgent(c.nodes[i])
		}
		wg.Wait()
	case 6:
		name := fmt.Sprint("mirror-", 1+c.rng.IntN(2))
		c.say("kill %s, and start it again", name)
		c.processes[name].kill()
		time.Sleep(time.Duration(c.rng.IntN(1000)) * time.Millisecond)
		c.startMirror(name)
	case 7:
		i := c.rng.IntN(len(c.consul.Servers))
		c.say("kill Consul server %d, and start it again", i+1)
		c.consul.Servers[i].Kill()
		time.Sleep(time.Duration(c.rng.IntN(3000)) * time.Millisecond)
		c.consul.Servers[i].Start()
		c.consul.WaitReady()
	case 8:
		prefix := []string{"kedge/status/", "kedge/status/prod/web/", "kedge/pins/prod/web/"}[c.rng.IntN(3)]
		c.say("delete all keys below %s", prefix)
		if _, err := c.anyClient().KV().DeleteTree(prefix, nil); err != nil {
			c.say("could not: %v", err)
		}
	}
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
	return c.consul.Servers[i].Client(c.consul.RootToken)
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
	out := map[string]string{}
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
		c.say("  %s %s %s", node, what, version)
		if what == "end" {
			delete(out, node)
			continue
		}
		out[node] = version
		if len(out) > c.budget {
			c.t.Errorf("at %s %d nodes are out of service, %d may: %v", time.Now().UTC().Format("15:04:05.000"), len(out), c.budget, out)
		}
	}
}

// end pushes a good release, starts what was stopped, and waits for all to be where Git says.
func (c *chaos) end() {
	c.deploy(true)
	last := c.good[len(c.good)-1]
	began := time.Now()
	c.live("app", last, c.nodes...)
	c.eventually("all converge", c.settled)
	c.say("converged on %s after %v", last, time.Since(began).Round(100*time.Millisecond))
	c.t.Logf("converged %v after the last push", time.Since(began).Round(100*time.Millisecond))
}
