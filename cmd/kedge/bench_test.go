package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
)

// The benchmarks measure the stock build, without -race, on real Consul and S3. They print and never assert:
//
//	go test ./cmd/kedge -run '^$' -bench . -benchtime 30x

// benchProgram lets the same benchmarks measure an earlier build.
var benchProgram = flag.String("bench.program", "", "measure this build of kedge; default: one of the tree")

// BenchmarkPushToSwitch is the time from git push returning to the switch of dest on a node, with a small release
// and a local bare repo that the mirror watches.
func BenchmarkPushToSwitch(b *testing.B) {
	w, pointers := benchWorld(b)
	i := 0
	measure(b, w, func() time.Time {
		i++
		w.release(fmt.Sprint(i), pointers[i%len(pointers)])
		return time.Now()
	})
}

// BenchmarkPinToSwitch is the time from the start, and from the end, of `consul kv put` to the switch of dest on a
// node.
func BenchmarkPinToSwitch(b *testing.B) {
	b.Run("no budget", func(b *testing.B) { benchPins(b, "") })
	b.Run("budget", func(b *testing.B) { benchPins(b, "rollout: {max_unavailable: 1}\n") })
}

// benchPins pins a unit whose file says rollout: with a budget the mirror lets the node in.
func benchPins(b *testing.B, rollout string) {
	w, pointers := benchWorld(b)
	if rollout != "" {
		file := "release: " + pointers[0].String() + "\n" + rollout
		commit := w.push("a budget", map[string]*string{webApp.String(): &file})
		w.eventually("the mirror takes it", func() error {
			e, err := w.store.Get(b.Context(), kv.MirrorKey)
			if err == nil && !strings.Contains(string(e.Value), commit) {
				err = fmt.Errorf("it is at %s", e.Value)
			}
			return err
		})
	}
	i := 0
	var puts []time.Duration
	measure(b, w, func() time.Time {
		i++
		start := time.Now()
		w.consul.CLI(w.consul.RootToken, "", "kv", "put", "kedge/pins/prod/web/app", pointers[i%len(pointers)].String())
		puts = append(puts, time.Since(start))
		return time.Now()
	})
	slices.Sort(puts)
	b.ReportMetric(float64(puts[len(puts)/2].Microseconds())/1e3, "ms-of-kv-put-itself")
}

// measure runs act, which returns the moment to count from, and waits for the switch that it causes, b.N times.
func measure(b *testing.B, w *world, act func() time.Time) {
	switched := watchSwitches(b, filepath.Join(w.srv("web-1")), "app")
	once := func() time.Duration {
		from := act()
		took := max(0, (<-switched).Sub(from))
		// The next round starts from rest: health confirmed, report written.
		w.reported("web-1", "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged {
				return "not converged"
			}
			return ""
		})
		return took
	}
	once() // not counted: a mirror that has just begun lets its nodes report first
	var took []time.Duration
	for b.Loop() {
		took = append(took, once())
	}
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(ms(took[len(took)/2]), "ms-median")
	b.ReportMetric(ms(took[len(took)*9/10]), "ms-p90")
	b.ReportMetric(ms(took[len(took)-1]), "ms-max")
}

// watchSwitches sends the time of each rename onto name in dir, as the kernel tells it.
func watchSwitches(b *testing.B, dir, name string) <-chan time.Time {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		b.Fatal(err)
	}
	events := make(chan time.Time, 16)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := unix.Read(fd, buf)
			if err != nil || n <= 0 {
				return
			}
			now := time.Now()
			for off := 0; off < n; {
				e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[off]))
				got := strings.TrimRight(string(buf[off+unix.SizeofInotifyEvent:off+unix.SizeofInotifyEvent+int(e.Len)]), "\x00")
				if got == name {
					events <- now
				}
				off += unix.SizeofInotifyEvent + int(e.Len)
			}
		}
	}()
	b.Cleanup(func() { unix.Close(fd) })
	return events
}

// benchWorld is a world whose kedge is the stock build, with a local bare repo, one node, and two small releases
// published.
func benchWorld(b *testing.B) (*world, []deployments.Pointer) {
	w := newWorld(b, "web-1")
	w.program = stockBuild(b)
	w.git.url = w.git.bare
	w.gitDo(w.work, "remote", "set-url", "origin", w.git.bare)
	pointers := []deployments.Pointer{w.publish("app", "1"), w.publish("app", "2")}
	w.startMirror("mirror-1", "--every", "60s")
	w.startAgent("web-1")
	w.release("first", pointers[0])
	w.live("app", "1", "web-1")
	return w, pointers
}

func stockBuild(b *testing.B) string {
	b.Helper()
	if *benchProgram != "" {
		return *benchProgram
	}
	path := filepath.Join(b.TempDir(), "kedge")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as it is released
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// BenchmarkIdle prints what an agent costs that has nothing to do: resident memory and processor time over ten
// seconds, and the size of the binary.
func BenchmarkIdle(b *testing.B) {
	w, _ := benchWorld(b)
	pid := w.processes["web-1"].cmd.Process.Pid
	for b.Loop() {
		before := cpuTime(b, pid)
		time.Sleep(10 * time.Second)
		b.ReportMetric((cpuTime(b, pid)-before).Seconds()*1e3/10, "cpu-ms/s")
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(residentKB(b, pid))/1e3, "MB-resident")
	info, err := os.Stat(w.program)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(info.Size())/1e6, "MB-binary")
}

// BenchmarkIdleWithChecks prints what an agent costs whose release has three checks that go on, beside one that has
// none: its own processor time over a minute, and that of what it ran. It fails where that wrote to Consul.
func BenchmarkIdleWithChecks(b *testing.B) {
	w, _ := benchWorld(b)
	addr := w.consul.Clients[0].Addr
	pid := w.processes["web-1"].cmd.Process.Pid
	status := func() map[string]uint64 { return w.consul.Versions("kedge/status/") }
	measure := func(name string) {
		time.Sleep(10 * time.Second) // what came of the switch is over
		before, own, children := status(), cpuTime(b, pid), childrenTime(b, pid)
		time.Sleep(time.Minute)
		b.ReportMetric((cpuTime(b, pid)-own).Minutes()*100, "%-of-a-core-"+name)
		b.ReportMetric((childrenTime(b, pid)-children).Minutes()*100, "%-by-commands-"+name)
		if now := status(); !maps.Equal(now, before) {
			b.Errorf("reports were written: %v, and %v before", now, before)
		}
	}
	for b.Loop() {
		measure("without")
		w.release("with checks", w.publish("app", "3", func(o *artifact.PublishOptions) {
			o.Manifest.Health = deployments.Health{Timeout: 10 * time.Second, Every: 10 * time.Second, Failures: 3,
				Checks: []deployments.Check{
					{HTTP: &deployments.HTTPCheck{URL: "http://" + addr + "/v1/status/leader", Status: 200}},
					{TCP: addr},
					{Exec: "true"},
				}}
		}))
		w.live("app", "3", "web-1")
		measure("with")
	}
	b.ReportMetric(0, "ns/op")
}

// childrenTime is the processor time of the commands that a process has run, in steps of 10 ms.
func childrenTime(b *testing.B, pid int) time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	// After the name, in parentheses, come fields 3 and on; 16 and 17 are cutime and cstime.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	user, _ := strconv.Atoi(fields[13])
	system, _ := strconv.Atoi(fields[14])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func residentKB(b *testing.B, pid int) int {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, _ := strconv.Atoi(strings.Fields(rest)[0])
			return n
		}
	}
	b.Fatal("no VmRSS")
	return 0
}

// cpuTime is the processor time of a process, from the kernel's clock of it.
func cpuTime(b *testing.B, pid int) time.Duration {
	var ts unix.Timespec
	// The CPU clock of another process: its id, inverted, in the upper bits (clock_getcpuclockid(3)).
	clock := int32(^pid<<3 | 2)
	if err := unix.ClockGettime(clock, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}
