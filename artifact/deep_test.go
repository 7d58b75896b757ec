package artifact

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
)

// deepTree is the environment variable by which TestDeepTrees runs itself.
const deepTree = "TEST_DEEP_TREE"

// A release's owner may make directories in it as deep as the disk takes them. Verifying, hashing, giving away and
// removing such a tree take few descriptors, little memory and no time.
func TestDeepTrees(t *testing.T) {
	t.Parallel()
	if top := os.Getenv(deepTree); top != "" {
		walkDeepTree(t, top)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	child := exec.CommandContext(
		ctx,
		"sh",
		"-c",
		`ulimit -Sn 192; ulimit -Hn 192; exec "$0" -test.run '^TestDeepTrees$' -test.v`,
		self,
	)
	child.Env = append(os.Environ(), deepTree+"="+filepath.Join(t.TempDir(), "deep"))
	out, err := child.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Fatalf("%v: %s", err, out)
	}
}

// walkDeepTree does to a deep tree all that is done to a live release. With 30,000 levels it takes 28 s, and no more
// memory.
func walkDeepTree(t *testing.T, top string) {
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	data, err := indexOfTree(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	treetest.MakeDeep(t, top, 5000)
	found, _, err := verifyTree(t.Context(), top, data, 0)
	if err != nil || !slices.ContainsFunc(found, func(d Difference) bool { return d.Path == "d" && d.What == "extra" }) {
		t.Errorf("verify: %v, %v", found, err)
	}
	if found, err := verifyOwner(t.Context(), top, "0", nil, nil); err != nil || len(found) != 0 && os.Getuid() == 0 {
		t.Errorf("owner: %v, %v", found, err)
	}
	if _, err := indexOfTree(t.Context(), top); err == nil || !strings.Contains(err.Error(), "directories deep") {
		t.Errorf("a list of hashes: %v", err)
	}
	if err := safefs.EmptyDir(top); err != nil {
		t.Error(err)
	}
	treetest.MakeDeep(t, top, 300)
	if err := safefs.RemoveTree(top); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(top); !os.IsNotExist(err) {
		t.Error(err)
	}
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	if stats.Sys > 128<<20 {
		t.Errorf("it took %d bytes", stats.Sys)
	}
}
