package git

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-git/go-billy/v5/memfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"kedge/deployments/fuzzlimit"
	"kedge/policy"
)

// Whatever a push brings as a commit, as its directories and as a file, it is either taken or finally refused,
// within bounds. In directories, twenty bytes of one letter stand for the hash of a directory (D) or the file (F).
func FuzzPushedObjects(f *testing.F) {
	inner := "100644 app.yaml\x00" + strings.Repeat("F", 20)
	outer := "100644 kedge.yaml\x00" + strings.Repeat("F", 20) + "40000 prod\x00" + strings.Repeat("D", 20)
	people := "author Ada <a@example.com> 1764230000 +0000\ncommitter Ada <a@example.com> 1764230000 +0000\n"
	f.Add([]byte(people+"\nDeploy\n"), []byte(outer), []byte(inner), []byte(unitFile("app/1")))
	f.Add(
		[]byte(
			"parent "+strings.Repeat(
				"0",
				40,
			)+"\n"+people+"gpgsig -----BEGIN SSH SIGNATURE-----\n a\n -----END SSH SIGNATURE-----\nmergetag x\n y\n\n\x1b",
		),
		[]byte(
			"40000 a\x00"+strings.Repeat("D", 20)+"160000 s\x00"+strings.Repeat("D", 20),
		),
		[]byte("120000 l.yaml\x00"+strings.Repeat("F", 20)),
		[]byte("../x"),
	)
	f.Fuzz(func(t *testing.T, commit, outer, inner, file []byte) {
		store := filesystem.NewStorage(memfs.New(), cache.NewObjectLRU(1<<20))
		put := func(kind plumbing.ObjectType, data []byte) plumbing.Hash {
			o := store.NewEncodedObject()
			o.SetType(kind)
			w, err := o.Writer()
			if err == nil {
				_, err = w.Write(data)
			}
			var hash plumbing.Hash
			if err = errors.Join(err, w.Close()); err == nil {
				hash, err = store.SetEncodedObject(o)
			}
			if err != nil {
				t.Fatal(err)
			}
			return hash
		}
		named := func(dir []byte, letter string, hash plumbing.Hash) []byte {
			return bytes.ReplaceAll(dir, bytes.Repeat([]byte(letter), 20), hash[:])
		}
		blob := put(plumbing.BlobObject, file)
		directory := put(plumbing.TreeObject, named(inner, "F", blob))
		tree := put(plumbing.TreeObject, named(named(outer, "F", blob), "D", directory))
		head := put(plumbing.CommitObject, append([]byte("tree "+tree.String()+"\n"), commit...))
		objects := &Objects{EncodedObjectStorer: store, dirs: []*filesystem.Storage{store}, subdir: "."}
		fuzzlimit.Run(t, []string{string(commit), string(outer), string(inner), string(file)}, func() {
			c, err := objects.loadWith(head.String(), func(_ string, _, signature []byte, _ time.Time) error {
				if err := checkForm(signature); err != nil && !errors.Is(err, policy.ErrUntrusted) {
					t.Errorf("the signature's form: %v", err)
				}
				return nil
			})
			switch {
			case err != nil:
			case len(c.Author) > 200 || len(c.Subject) > 200 || !utf8.ValidString(c.Author+c.Subject) ||
				strings.ContainsAny(c.Author+c.Subject, "\x1b\n\r"):
				t.Errorf("it is by %q: %q", c.Author, c.Subject)
			}
			_, _ = objects.Descends(t.Context(), head.String(), head.String())
			if _, err := objects.readSignedContent(head.String()); err != nil {
				t.Error(err)
			}
		})
	})
}

func FuzzReadUpdates(f *testing.F) {
	f.Add(strings.Repeat("0", 40) + " " + strings.Repeat("a", 40) + " refs/heads/main\n")
	f.Fuzz(func(t *testing.T, stdin string) {
		fuzzlimit.Run(t, stdin, func() {
			all, err := ReadUpdates(strings.NewReader(stdin))
			for _, u := range all {
				if err == nil && (u.New != "" && !IsHash(u.New) || u.Old != "" && !IsHash(u.Old)) {
					t.Errorf("%q gives %+v", stdin, u)
				}
			}
		})
	})
}
