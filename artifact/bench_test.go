package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

var methodsOfBench = flag.String("methods", "", "a regular expression of the methods that BenchmarkPeers measures")

// BenchmarkPeers times ways to get a release onto a disk, side by side, as .ci/bench prepares and calls it: over
// loopback, and over a link of 20 ms round trip and 50 MB/s. It prints medians: seconds without the final sync
// (nobody but kedge makes one; what it takes is in a column of its own), the ratio to the best pipeline of standard
// tools, CPU seconds of the processes that fetch, kedge's peak memory, the requests that the S3 server logged, and
// the bytes that came over the link, which the server's log doesn't tell (none for loopback, where nothing stands
// between). Each run has a freshly made ext4 file system: where a tree was just removed, ext4 is slow for reasons
// that are none of the peers'.
func BenchmarkPeers(b *testing.B) {
	trees := benchTrees(b)
	s := newBenchStore(b)
	r1 := s.publish(b, filepath.Join(trees, "r1"), "r1", false)
	linked := s.publish(b, filepath.Join(trees, "r1"), "r1-immutable", true)
	e1 := s.publish(b, filepath.Join(trees, "e1"), "e1", false, r1)
	e1Linked := s.publish(b, filepath.Join(trees, "e1"), "e1-immutable", true, linked)
	d1 := s.publish(b, filepath.Join(trees, "d1"), "d1", false, r1)
	d1Linked := s.publish(b, filepath.Join(trees, "d1"), "d1-immutable", true, linked)
	alone := s.publish(b, filepath.Join(trees, "d1"), "d1-alone", true)
	s.tarballs(b, filepath.Join(trees, "r1"))

	pipeline := method{name: "curl | zstd | tar", shell: `get plain.tar.zst | zstd -dcq | tar -xf - -C "$DISK"`}
	methods := []method{
		pipeline,
		{name: "s5cmd, then tar", shell: `"$S5CMD" --endpoint-url "$ENDPOINT" cp s3://kedge/plain.tar.zst "$DISK/a" >/dev/null && mkdir "$DISK/t" && zstd -dcq "$DISK/a" | tar -xf - -C "$DISK/t"`},
		{name: "stretcher: GET, tar xzf, rsync", shell: `get plain.tar.gz >"$DISK/a" && mkdir "$DISK/t" && tar -xzf "$DISK/a" -C "$DISK/t" && rsync -a --delete "$DISK/t/" "$DISK/dest/"`},
		{name: "cp -r", shell: `cp -r "$TREE" "$DISK/t"`},
		{name: "kedge, cold", to: r1},
		{name: "kedge, 71 edits, copies", from: r1, to: e1},
		{name: "kedge, 71 edits, hard links", from: linked, to: e1Linked},
		{name: "kedge, server rebuilt, copies", from: r1, to: d1},
		{name: "kedge, server rebuilt, hard links", from: linked, to: d1Linked},
		{name: "kedge, the same without a delta", from: linked, to: alone},
		{name: "kedge, booted with r1, 71 edits", from: linked, to: e1Linked, booted: true},
	}
	chosen := regexp.MustCompile(*methodsOfBench)
	methods = slices.DeleteFunc(methods, func(m method) bool { return !chosen.MatchString(m.name) })
	for _, link := range []struct {
		name string
		slow bool
	}{{"loopback", false}, {"20 ms, 50 MB/s", true}} {
		b.Run(strings.ReplaceAll(link.name, " ", "_"), func(b *testing.B) {
			seen := make([][]timing, len(methods))
			for range b.N {
				for i, m := range methods {
					seen[i] = append(seen[i], s.measure(b, m, filepath.Join(trees, "r1"), link.slow))
				}
			}
			first := median(seen[0])
			b.Logf("%s, %d rounds, medians", link.name, b.N)
			b.Logf("%-36s %7s %7s %7s %7s %9s %9s %8s", "", "s", "ratio", "+sync", "CPU s", "peak MB", "MB", "requests")
			for i, m := range methods {
				got := median(seen[i])
				b.Logf("%-36s %7.2f %7.2f %7s %7.2f %9s %9s %8.0f", m.name, got.wall, got.wall/first.wall, measured("%.2f", got.sync), got.cpu,
					measured("%.0f", got.memory/1e6), measured("%.3f", got.sent/1e6), got.requests)
				b.ReportMetric(got.wall/first.wall, strings.NewReplacer(" ", "-", ",", "").Replace(m.name)+"/pipeline")
			}
		})
	}
}

// BenchmarkPack times publish's packing against tar | zstd -T0 -3 on the same tree, by turns, neither onto a disk. It
// compares their sizes, too.
func BenchmarkPack(b *testing.B) {
	tree := filepath.Join(benchTrees(b), "r1")
	var ours, theirs []float64
	var made archive.Packed
	var stream int64
	for range b.N {
		start := time.Now()
		out, err := exec.CommandContext(b.Context(), "sh", "-c",
			`tar -C "$1" -cf - . | zstd -q -T0 -3 | wc -c`, "sh", tree).Output()
		if err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, time.Since(start).Seconds())
		if _, err := fmt.Sscan(string(out), &stream); err != nil {
			b.Fatal(err)
		}
		start = time.Now()
		made, err = archive.Pack(b.Context(), tree, deployments.SymlinksInside, archive.CompressionDefault, io.Discard, nil)
		if err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(start).Seconds())
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	b.Logf("kedge %.2f s, %.1f MB and an index of %.1f MB; tar | zstd %.2f s, %.1f MB", ours[len(ours)/2],
		float64(made.Size)/1e6, float64(len(made.Index))/1e6, theirs[len(theirs)/2], float64(stream)/1e6)
	b.ReportMetric(ours[len(ours)/2]/theirs[len(theirs)/2], "pack/tar-zstd")
	b.ReportMetric(float64(made.Size)/float64(stream), "bytes/tar-zstd")
}

func benchTrees(b *testing.B) string {
	dir := os.Getenv("KEDGE_BENCH_TREES")
	if dir == "" {
		b.Fatal("run .ci/bench: it makes the trees to measure with")
	}
	return dir
}

// measured shows a figure, and a dash where there is none: a shell doesn't sync, its memory isn't looked at, and
// bytes are counted on the slow link.
func measured(format string, v float64) string {
	if v == 0 {
		return "-"
	}
	return fmt.Sprintf(format, v)
}

// method is one way: a shell's, or kedge's.
type method struct {
	name     string
	shell    string
	from, to *deployments.Pointer // from nil: cold
	booted   bool                 // with an empty page cache, as a node that boots from an image which holds from
}

// timing is what one run took: seconds, bytes.
type timing struct{ wall, sync, cpu, memory, sent, requests float64 }

func median(all []timing) timing {
	of := func(field func(timing) float64) float64 {
		var values []float64
		for _, s := range all {
			values = append(values, field(s))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return timing{of(func(s timing) float64 { return s.wall }), of(func(s timing) float64 { return s.sync }), of(func(s timing) float64 { return s.cpu }),
		of(func(s timing) float64 { return s.memory }), of(func(s timing) float64 { return s.sent }), of(func(s timing) float64 { return s.requests })}
}

// benchStore is an S3 server, seen directly and through a slow link.
type benchStore struct {
	server *objecttest.Server
	log    string
	link   *link
}

func newBenchStore(b *testing.B) *benchStore {
	log := filepath.Join(b.TempDir(), "access.log")
	server := objecttest.Start(b, "--access-log", log)
	return &benchStore{server: server, log: log, link: slowLink(b, strings.TrimPrefix(server.Endpoint(), "http://"))}
}

func (s *benchStore) publish(b *testing.B, dir, version string, immutable bool, since ...*deployments.Pointer) *deployments.Pointer {
	opt := PublishOptions{Dir: dir, To: s.server.URL("releases"),
		Manifest: deployments.Manifest{Name: "bench", Version: version, Dest: "/srv/bench", Strategy: deployments.StrategyRelease, Immutable: immutable}}
	for _, p := range since {
		opt.Since = append(opt.Since, *p)
	}
	out, err := Publish(b.Context(), s.server.Client(), opt)
	if err != nil {
		b.Fatal(err)
	}
	return &out.Pointer
}

func (s *benchStore) tarballs(b *testing.B, tree string) {
	run(b, "sh", "-c", `tar -C "$1" -cf - . | zstd -q -T0 -3 -o "$2/plain.tar.zst" && tar -C "$1" -czf "$2/plain.tar.gz" .`, "sh", tree, s.server.Dir())
}

func (s *benchStore) measure(b *testing.B, m method, tree string, slow bool) timing {
	disk, release := freshDisk(b)
	defer release()
	endpoint := s.server.Endpoint()
	if slow {
		endpoint = "http://" + s.link.address
	}
	if m.from != nil {
		s.fetch(b, s.server.Endpoint(), disk, m.from)
	}
	if m.booted {
		run(b, "sh", "-c", "sync && echo 3 >/proc/sys/vm/drop_caches")
	}
	if m.booted { // what the next method reads is in memory, as it was for this one's
		defer run(b, "sh", "-c", `find "$@" -type f -exec cat {} + >/dev/null`, "sh", tree, s.server.Dir())
	}
	requests, sent := s.requests(b), s.link.sent.Load()
	var got timing
	if m.shell != "" {
		command := exec.Command("bash", "-c", "set -eo pipefail; get() { "+
			`curl -sf --aws-sigv4 "aws:amz:$AWS_REGION:s3" --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" -H "x-amz-content-sha256: UNSIGNED-PAYLOAD" "$ENDPOINT/kedge/$1"; }; `+m.shell)
		command.Env = append(append(os.Environ(), s.server.Env()...),
			"ENDPOINT="+endpoint, "DISK="+disk, "TREE="+tree, "S5CMD="+tooltest.Path(b, "s5cmd"))
		start := time.Now()
		if out, err := command.CombinedOutput(); err != nil {
			b.Fatalf("%s: %v\n%s", m.name, err, out)
		}
		got = spent(command, time.Since(start).Seconds())
	} else {
		got = s.fetch(b, endpoint, disk, m.to)
	}
	got.requests, got.sent = float64(s.requests(b)-requests), float64(s.link.sent.Load()-sent)
	return got
}

// requests counts the lines of the server's access log, but for what comments it.
func (s *benchStore) requests(b *testing.B) int {
	log, err := os.ReadFile(s.log)
	if err != nil {
		b.Fatal(err)
	}
	return bytes.Count(log, []byte(" s3_"))
}

func spent(c *exec.Cmd, wall float64) timing {
	return timing{wall: wall, cpu: (c.ProcessState.UserTime() + c.ProcessState.SystemTime()).Seconds()}
}

// benchEnv makes a child process fetch: its own memory and CPU time are what is measured.
const benchEnv = "KEDGE_BENCH_FETCH"

type benchPlan struct {
	Endpoint, Dest string
	Pointer        deployments.Pointer
}

type benchResult struct {
	Fetched time.Time
	Memory  float64 // bytes resident at most
}

func (s *benchStore) fetch(b *testing.B, endpoint, disk string, p *deployments.Pointer) timing {
	plan, err := json.Marshal(benchPlan{endpoint, filepath.Join(disk, "dest"), *p})
	if err != nil {
		b.Fatal(err)
	}
	command := exec.Command(os.Args[0])
	command.Env = append(append(os.Environ(), s.server.Env()...), benchEnv+"="+string(plan), "AWS_ENDPOINT_URL_S3="+endpoint)
	var out, problems bytes.Buffer
	command.Stdout, command.Stderr = &out, &problems
	start := time.Now()
	if err := command.Run(); err != nil {
		b.Fatalf("fetch %s: %v\n%s", p, err, problems.String())
	}
	end := time.Now()
	var result benchResult
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		b.Fatalf("%v: %q", err, out.String())
	}
	got := spent(command, result.Fetched.Sub(start).Seconds())
	got.sync, got.memory = end.Sub(result.Fetched).Seconds(), result.Memory
	return got
}

// playFetch is the child's part: it stages a release, switches to it, and says when the fetching had ended.
func playFetch(text string) error {
	var plan benchPlan
	if err := json.Unmarshal([]byte(text), &plan); err != nil {
		return err
	}
	debug.SetGCPercent(50) // as the agent does
	ctx := context.Background()
	objects := object.New(object.Config{})
	raw, err := objects.ReadAll(ctx, plan.Pointer.URL, deployments.MaxManifest)
	if err != nil {
		return err
	}
	m, err := deployments.ParseManifest(raw, plan.Pointer.URL, os.LookupEnv)
	if err != nil {
		return err
	}
	releases := Open(plan.Dest, objects, nil)
	var fetched time.Time
	releases.step = func(name string) {
		if name == "fetched" {
			fetched = time.Now()
		}
	}
	release, err := releases.Stage(ctx, plan.Pointer, m, raw, StageOptions{})
	if err != nil {
		return err
	}
	if err := releases.Switch(release); err != nil {
		return err
	}
	// Not getrusage's, which an exec leaves as it was before.
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	result := benchResult{Fetched: fetched}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscan(rest, &result.Memory); err != nil {
		return fmt.Errorf("/proc/self/status: %w", err)
	}
	result.Memory *= 1024
	return json.NewEncoder(os.Stdout).Encode(result)
}

// freshDisk gives a directory on a file system of its own, and what ends it.
func freshDisk(b *testing.B) (dir string, release func()) {
	work, err := os.MkdirTemp("", "kedge-bench-")
	if err != nil {
		b.Fatal(err)
	}
	dir, image := filepath.Join(work, "disk"), filepath.Join(work, "image")
	run(b, "mkdir", dir)
	run(b, "truncate", "-s", "4G", image)
	run(b, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	run(b, "mount", "-o", "loop", image, dir)
	return dir, func() {
		run(b, "umount", dir)
		run(b, "rm", "-r", work)
	}
}

func run(b *testing.B, name string, args ...string) {
	b.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
