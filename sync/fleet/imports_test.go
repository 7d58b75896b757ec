package fleet

import (
	"os/exec"
	"strings"
	"testing"
)

// Who only reads the store links neither Git nor an object store's client.
func TestReadersLinkNeitherGitNorAWS(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "kedge/sync/fleet", "kedge/sync/web").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for _, heavy := range []string{"github.com/go-git/", "github.com/aws/", "kedge/artifact", "kedge/sync/mirror"} {
			if strings.HasPrefix(dep, heavy) {
				t.Errorf("it links %s", dep)
			}
		}
	}
}
