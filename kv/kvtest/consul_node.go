package kvtest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/deployments/tooltest"
)

// newNode picks an address and free ports for a node, which keeps them when it restarts. start starts the node.
func (c *Consul) newNode(name string, memory bool) *ConsulNode {
	n := &ConsulNode{Name: name, consul: c, dir: c.tb.TempDir(), memory: memory}
	n.IP = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	ports := make([]int, 3)
	var held []*net.TCPListener
	for i := range ports {
		l, err := listenBelow(n.IP)
		if err != nil {
			c.tb.Fatalf("find a free port on %s: %v", n.IP, err)
		}
		held = append(held, l)
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	for _, l := range held {
		l.Close()
	}
	n.Addr = fmt.Sprintf("%s:%d", n.IP, ports[0])
	n.serfPort, n.serverPort = ports[1], ports[2]
	c.tb.Cleanup(func() {
		n.Kill()
		if c.tb.Failed() {
			c.tb.Logf("consul %s:\n%s", n.Name, n.logTail())
		}
	})
	return n
}

// FreeAddr returns IP:PORT with a free port of ip, which is an address of this machine. By default the system doesn't
// give that port to other programs by itself: see listenBelow.
func FreeAddr(tb testing.TB, ip string) string {
	tb.Helper()
	l, err := listenBelow(ip)
	if err != nil {
		tb.Fatalf("find a free port on %s: %v", ip, err)
	}
	defer l.Close()
	return l.Addr().String()
}

// listenBelow listens at a random free port of ip, from 10,000 to 29,999. Linux takes ephemeral ports from 32,768 on by
// default. One of those could be taken by a listener on all addresses while the test's program starts.
func listenBelow(ip string) (l *net.TCPListener, err error) {
	for range 20 {
		port := 10_000 + rand.IntN(20_000)
		if l, err = net.ListenTCP("tcp", &net.TCPAddr{IP: net.ParseIP(ip), Port: port}); err == nil {
			return l, nil
		}
	}
	return nil, err
}

func (n *ConsulNode) configure(o ConsulOptions, server bool, servers int, join []string) {
	config := map[string]any{
		"node_name": n.Name, "bind_addr": n.IP, "client_addr": n.IP, "advertise_addr": n.IP, "server": server,
		"ports": map[string]int{
			"http": portOf(n.Addr), "serf_lan": n.serfPort, "server": n.serverPort,
			"https": -1, "dns": -1, "grpc": -1, "grpc_tls": -1, "serf_wan": -1,
		},
		"connect":              map[string]any{"enabled": false},
		"peering":              map[string]any{"enabled": false},
		"ui_config":            map[string]any{"enabled": false},
		"performance":          map[string]any{"raft_multiplier": 1},
		"limits":               map[string]any{"http_max_conns_per_client": 0, "rpc_max_conns_per_client": 0},
		"disable_update_check": true, "leave_on_terminate": false, "skip_leave_on_interrupt": true,
		// The death of a node is noticed within a second or two, as in Consul's own tests.
		"gossip_lan": map[string]any{
			"gossip_interval": "100ms", "probe_interval": "200ms", "probe_timeout": "150ms", "suspicion_mult": 3,
		},
		"log_level": "INFO",
	}
	if !n.memory {
		config["data_dir"] = filepath.Join(n.dir, "data")
		if server {
			config["bootstrap_expect"] = servers
		}
		if servers > 1 || !server {
			config["retry_join"], config["retry_interval"] = join, "200ms"
		}
	}
	if o.ACL {
		config["acl"] = map[string]any{"enabled": true, "default_policy": "deny", "enable_token_persistence": false,
			"tokens": map[string]string{"initial_management": n.consul.RootToken, "agent": n.consul.RootToken}}
	}
	data, err := json.Marshal(config)
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "node.json"), data, 0o600)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(n.dir, "test.hcl"), []byte(o.Config), 0o600)
	}
	if err != nil {
		n.consul.tb.Fatalf("configure consul %s: %v", n.Name, err)
	}
}

// Start restarts a node that Stop or Kill ended, with its data and ports. It doesn't wait for the node: see
// Consul.WaitReady. For a lone server it needs ConsulOptions.Persistent.
func (n *ConsulNode) Start() {
	n.consul.tb.Helper()
	if n.memory {
		n.consul.tb.Fatalf(
			"consul %s keeps its data in memory and can't be started again: set ConsulOptions.Persistent",
			n.Name,
		)
	}
	n.start()
}

func (n *ConsulNode) start() {
	tb := n.consul.tb
	tb.Helper()
	args := []string{
		"agent",
		"-config-file=" + filepath.Join(n.dir, "node.json"),
		"-config-file=" + filepath.Join(n.dir, "test.hcl"),
	}
	if n.memory {
		args = append(args, "-dev")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil && n.proc.running() {
		tb.Fatalf("consul %s runs already", n.Name)
	}
	var err error
	if n.proc, err = startProcess(filepath.Join(n.dir, "log"), tooltest.Path(tb, "consul"), args...); err != nil {
		tb.Fatalf("start consul %s: %v", n.Name, err)
	}
}

// SetConfig replaces ConsulOptions.Config, for this node's next Start or Reload.
func (n *ConsulNode) SetConfig(hcl string) {
	n.consul.tb.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, "test.hcl"), []byte(hcl), 0o600); err != nil {
		n.consul.tb.Fatalf("configure consul %s: %v", n.Name, err)
	}
}

// Reload makes the node read its configuration again.
func (n *ConsulNode) Reload() { n.signal(syscall.SIGHUP, false) }

// Stop ends the node in order, without leaving the cluster, as a reboot does.
func (n *ConsulNode) Stop() { n.signal(syscall.SIGTERM, true) }

// Kill ends the node as a power cut does.
func (n *ConsulNode) Kill() { n.signal(syscall.SIGKILL, true) }

// Suspend stops the node's process: it neither answers nor refuses, as after a network cut.
func (n *ConsulNode) Suspend() { n.signal(syscall.SIGSTOP, false) }

// Resume ends Suspend.
func (n *ConsulNode) Resume() { n.signal(syscall.SIGCONT, false) }

// PID returns the id of the process of a node that runs, for measurements.
func (n *ConsulNode) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc.cmd.Process.Pid
}

// Running reports whether the node's process exists, suspended or not.
func (n *ConsulNode) Running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc != nil && n.proc.running()
}

func (n *ConsulNode) signal(s syscall.Signal, wait bool) {
	n.mu.Lock()
	p := n.proc
	if wait {
		n.proc = nil
	}
	n.mu.Unlock()
	if p == nil {
		return
	}
	p.signal(s)
	if wait {
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			p.signal(syscall.SIGKILL)
			<-p.done
		}
	}
}

// exited returns why the node's process ended by itself; nil: it didn't.
func (n *ConsulNode) exited() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil || n.proc.running() {
		return nil
	}
	return n.proc.state
}

// logTail returns the end of the node's log, without lines at level INFO.
func (n *ConsulNode) logTail() string {
	data, _ := os.ReadFile(filepath.Join(n.dir, "log"))
	var lines []string
	for line := range strings.Lines(string(data)) {
		if !strings.Contains(line, " [INFO] ") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-30):], "")
}

func portOf(addr string) int {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return 0
	}
	return a.Port
}
