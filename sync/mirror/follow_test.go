package mirror

import (
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments/wait"
	"kedge/sync/git"
	"kedge/sync/git/gittest"
)

// cloneCut is a branch of a clone that lacks commits. It counts how often it was to be read anew.
type cloneCut struct {
	git.Branch
	dir      string
	distrust int
}

func (c *cloneCut) Objects() (*git.Objects, error) {
	return git.OpenObjects(filepath.Join(c.dir, "objects"))
}
func (c *cloneCut) Distrust() { c.distrust++ }

// A question that the repository can answer must not put off that it is read anew for one that it can't.
func TestQuestionsBesideAGap(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	third := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/4")})
	source := &cloneCut{dir: filepath.Join(t.TempDir(), "cut.git")}
	o.Git("", "clone", "-q", "--bare", "--depth=3", "file://"+o.Bare, source.dir)
	synctest.Test(t, func(t *testing.T) {
		f := &follower{source: source, pollNow: wait.NewSignal(), gaps: map[question]*gap{}}
		for range 60 {
			if _, err := f.descends(t.Context(), first, head); !errors.Is(err, git.ErrGap) {
				t.Fatalf("the whole history: %v", err)
			}
			if is, err := f.descends(t.Context(), third, head); !is || err != nil {
				t.Fatalf("the newer half: %t, %v", is, err)
			}
			time.Sleep(5 * time.Second)
		}
		// The pauses average 2, 4, 8 ... 256 s, and are random between nothing and twice that.
		if source.distrust < 3 || source.distrust > 30 {
			t.Errorf("it was read anew %d times in five minutes", source.distrust)
		}
		time.Sleep(2*longestGap + time.Second)
		if _, err := f.descends(t.Context(), first, second); !errors.Is(err, git.ErrGap) {
			t.Errorf("another question: %v", err)
		}
		if len(f.gaps) != 1 {
			t.Errorf("%d questions are kept that nobody asks any more", len(f.gaps)-1)
		}
	})
}
