package deployments

import (
	"reflect"
	"strings"
	"testing"
)

func TestSecretRefs(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][3]string{
		"file:/etc/kedge/secrets/db":          {"file", "/etc/kedge/secrets/db", ""},
		"file:/etc/kedge/a#b":                 {"file", "/etc/kedge/a#b", ""},
		"credential:db.password":              {"credential", "db.password", ""},
		"ssm:/prod/db":                        {"ssm", "/prod/db", ""},
		"ssm:/prod/db:3":                      {"ssm", "/prod/db:3", ""},
		"secretsmanager:prod/db":              {"secretsmanager", "prod/db", ""},
		"secretsmanager:prod/db#password":     {"secretsmanager", "prod/db", "password"},
		"vault:secret/data/prod/db#password":  {"vault", "secret/data/prod/db", "password"},
		"ssm:arn:aws:ssm:eu-west-1:1:param/x": {"ssm", "arn:aws:ssm:eu-west-1:1:param/x", ""},
	} {
		ref, err := ParseSecretRef(text)
		if source, name, field := ref.Parts(); err != nil || [3]string{source, name, field} != want {
			t.Errorf("%s: %q %q %q, %v", text, source, name, field, err)
		}
	}
	for _, text := range []string{
		"", "db", "ssm", "ssm:", "s3:/x", "env:X", "SSM:/prod/db", "ssm:/prod/../other", "ssm:/prod//db", "ssm:/prod/db ",
		"ssm:/prod/\ndb", "file:etc/x", "file:/etc/../x", "file:/", "file:/a//b", "file:/a/", "credential:a/b", "credential:..",
		"vault:secret/data/x", "vault:secret/data/x#", "vault:#x", "vault:secret/../sys/raw#x", "vault:secret/x?list=true#y",
		"vault:secret/%2e%2e/x#y", "secretsmanager:x#", "ssm:" + strings.Repeat("x", maxSecretRef),
	} {
		if ref, err := ParseSecretRef(text); err == nil {
			t.Errorf("%q is taken for %q", text, ref)
		}
	}
}

// An entry of the allow-list names references by whole parts: ssm:/prod is not the beginning of ssm:/production.
func TestSecretsAreAllowedByWholeParts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		ref     SecretRef
		allowed string
		want    bool
	}{
		{"ssm:/prod/db", "ssm:/prod/", true},
		{"ssm:/prod/db", "ssm:/prod", true},
		{"ssm:/prod/db", "ssm:/prod/db", true},
		{"ssm:/production/db", "ssm:/prod", false},
		{"ssm:/prod/db2", "ssm:/prod/db", false},
		{"ssm:/prod", "ssm:/prod/", false},
		{"secretsmanager:/prod/db", "ssm:/prod/", false},
		{"vault:secret/data/db#password", "vault:secret/data/db", true},
		{"vault:secret/data/db#password", "vault:secret/data/db#user", false},
		{"file:/etc/kedge/secrets/db", "file:/etc/kedge/secrets/", true},
	} {
		if err := CheckSecretPrefix(c.allowed); err != nil {
			t.Error(err)
		}
		if _, got := c.ref.Within([]string{"credential:other", c.allowed}); got != c.want {
			t.Errorf("%s within %s: %v", c.ref, c.allowed, got)
		}
	}
	if _, ok := SecretRef("ssm:/x").Within(nil); ok {
		t.Error("without an allow-list all is allowed")
	}
	for _, bad := range []string{"", "*", "ssm", "ssm:", "ssm:/", "/prod", "env:X", "file:etc", "file:/a/../b", "vault:a/../b/"} {
		if CheckSecretPrefix(bad) == nil {
			t.Errorf("%q is taken for an entry of the allow-list", bad)
		}
	}
}

func TestManifestSecrets(t *testing.T) {
	t.Parallel()
	text := "commands: {post: ['true'], env: {A: b}}\nsecrets:\n  DB_URL: ssm:/{{ must_env `STAGE` }}/db\n  KEY: vault:kv/app#key\n"
	env := func(string) (string, bool) { return "prod", true }
	m, err := ParseManifest([]byte(text), "s3://b/m.yaml", env)
	want := map[string]SecretRef{"DB_URL": "ssm:/prod/db", "KEY": "vault:kv/app#key"}
	if err != nil || !reflect.DeepEqual(m.Secrets, want) {
		t.Fatalf("%v, %v", m, err)
	}
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ParseManifest(data, "s3://b/m.yaml", nil); err != nil || !reflect.DeepEqual(again.Secrets, want) {
		t.Errorf("encoded and read again: %v\n%s", err, data)
	}
	for bad, says := range map[string]string{
		"commands: {env: {A: b}}\nsecrets: {A: ssm:/x}": `2:1: variable "A" stands in secrets and in commands.env`,
		"secrets: {KEDGE_X: ssm:/x}":                    "are reserved",
		"secrets: {A: }":                                "has no reference",
		"secrets: {A: null}":                            "has no reference",
		"secrets: {A: hunter2}":                         "1:14: want SOURCE:NAME, as in ssm:/prod/db",
		"secrets: {A: ssm:/x, A: ssm:/y}":               "is given twice",
		"secrets: [A]":                                  "want variables by name",
		"secrets: {'a b': ssm:/x}":                      "want letters, digits",
	} {
		if _, err := ParseManifest([]byte(bad), "s3://b/m.yaml", nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", bad, err, says)
		}
	}
}
