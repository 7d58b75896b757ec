package deployments

import (
	"fmt"
	"strings"
	"testing"

	"kedge/deployments/fuzzlimit"
)

// Manifests that are read before anybody's signature on them is: they cost little, and so does the error.
func TestHostileManifests(t *testing.T) { // not beside others, whose memory would count
	for name, text := range map[string]string{
		"104,000 ifs":               strings.Repeat("{{if 1}}", 104_000),
		"104,000 ifs that end":      strings.Repeat("{{if 1}}x{{end}}", 50_000),
		"ifs in one another":        strings.Repeat("{{if 1}}", 1500) + strings.Repeat("{{end}}", 1500),
		"a manifest of digits":      strings.Repeat("9", MaxManifest),
		"a field of digits":         "keep: " + strings.Repeat("9", MaxManifest-10),
		"a name without end":        strings.Repeat("x", MaxManifest-2) + ": 1",
		"a checksum without end":    "checksum: " + strings.Repeat("a", MaxManifest-20),
		"a string in a template":    "{{ printf \"%1000s\" \"" + strings.Repeat("a", MaxManifest-100) + "\" }}",
		"brackets in one another":   strings.Repeat("[", MaxManifest),
		"aliases of aliases":        "a: &a [x,x,x,x,x,x,x,x,x]\n" + strings.Repeat("b: &b [*a,*a,*a,*a,*a,*a,*a]\n", 1000),
		"names of variables":        "{{ env" + numbered(" `n%d`") + " }}",
		"variables":                 "{{ print" + numbered(" (env `n%d`)") + " }}",
		"a document of many fields": strings.Repeat("a: 1\n", MaxManifest/5),
	} {
		fuzzlimit.Run(t, name, func() {
			_, err := ParseTemplate([]byte(text), manifestURL)
			if _, expanded := ParseManifest(
				[]byte(text),
				manifestURL,
				func(string) (string, bool) { return "", false },
			); err == nil {
				err = expanded
			}
			if name == "ifs in one another" && err == nil {
				return // they are few enough
			}
			if err == nil || len(err.Error()) > 16<<10 {
				t.Errorf("%s: the error has %d bytes: %.300v", name, len(err.Error()), err)
			}
			if strings.HasPrefix(name, "104,000 ifs") && !strings.Contains(err.Error(), "actions ({{ }}), at most") {
				t.Errorf("%s were parsed: %v", name, err)
			}
		})
	}
}

// numbered repeats a format, with a number each time, to almost the size of a manifest.
func numbered(format string) string {
	var b strings.Builder
	for i := 0; b.Len() < MaxManifest-100; i++ {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}
