BEGIN TRANSACTION;
CREATE TABLE registry_channels (
	name VARCHAR(64) NOT NULL, 
	version_id VARCHAR(64) NOT NULL, 
	moved_at DATETIME NOT NULL, 
	CONSTRAINT pk_registry_channels PRIMARY KEY (name), 
	CONSTRAINT fk_registry_channels_version_id FOREIGN KEY(version_id) REFERENCES registry_versions (version_id)
);
INSERT INTO "registry_channels" VALUES('dev','dbe6d4ff777373c6eabf7ed9afd09fa9ddc63410cf24d10827cac4beb1abeb98','2026-01-01 00:00:00.000000');
INSERT INTO "registry_channels" VALUES('stable','0452239af6fbe73ed7b21cf0e9db82890cac4731a8b6a4921c3349b95be4699c','2026-01-01 00:00:00.000000');
CREATE TABLE registry_schema (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT registry_schema_pkc PRIMARY KEY (version_num)
);
INSERT INTO "registry_schema" VALUES('0001');
CREATE TABLE registry_versions (
	sequence INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	version_id VARCHAR(64) NOT NULL, 
	run_id VARCHAR(200) NOT NULL, 
	round_number INTEGER NOT NULL, 
	parent VARCHAR(64), 
	base_digest VARCHAR(200) NOT NULL, 
	weights_digest VARCHAR(64) NOT NULL, 
	state_digest VARCHAR(64), 
	manifest TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT uq_registry_versions_version_id UNIQUE (version_id), 
	CONSTRAINT fk_registry_versions_parent FOREIGN KEY(parent) REFERENCES registry_versions (version_id)
);
INSERT INTO "registry_versions" VALUES(1,'8d75eafdf10eac4e7bd7479fa86f988ffc055eb46f92fd34cede403ad04d9c39','old-run',0,NULL,'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','b6776a5e4ab488d8e9945941ab1495e02928868bde77e43e726cd2b48c60381b','d19ffb904395eada15ce069ce68c9ae4098a131c064b3b9b78e685d9bbe6187b','{"base_digest":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","code_version":"0.1.0","method":"fedit + sgd","metrics":{"train_loss":1.5},"parent":null,"participants":0,"privacy":null,"round_number":0,"run_id":"old-run","servable":true,"spec":{"alpha":4.0,"dtype":"F32","head":null,"modules":[{"alpha":4.0,"d_in":4,"d_out":4,"fan_in_fan_out":false,"name":"layer","rank":2}],"peft_type":"lora","rank":2,"use_rslora":false},"task":{},"weights_digest":"b6776a5e4ab488d8e9945941ab1495e02928868bde77e43e726cd2b48c60381b"}','2026-01-01 00:00:00.000000');
INSERT INTO "registry_versions" VALUES(2,'0452239af6fbe73ed7b21cf0e9db82890cac4731a8b6a4921c3349b95be4699c','old-run',1,'8d75eafdf10eac4e7bd7479fa86f988ffc055eb46f92fd34cede403ad04d9c39','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','3bb63c501a2cb9b43bfbf09f0b02a7f12408e1922617522b8441afd37272b915','2780e2d008eba4f8b30ac02f5ec0a66ce5285a29bb2d1a6c0164ea2c7dd17544','{"base_digest":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","code_version":"0.1.0","method":"fedit + sgd","metrics":{"train_loss":0.5},"parent":"8d75eafdf10eac4e7bd7479fa86f988ffc055eb46f92fd34cede403ad04d9c39","participants":1,"privacy":null,"round_number":1,"run_id":"old-run","servable":true,"spec":{"alpha":4.0,"dtype":"F32","head":null,"modules":[{"alpha":4.0,"d_in":4,"d_out":4,"fan_in_fan_out":false,"name":"layer","rank":2}],"peft_type":"lora","rank":2,"use_rslora":false},"task":{},"weights_digest":"3bb63c501a2cb9b43bfbf09f0b02a7f12408e1922617522b8441afd37272b915"}','2026-01-01 00:00:00.000000');
INSERT INTO "registry_versions" VALUES(3,'dbe6d4ff777373c6eabf7ed9afd09fa9ddc63410cf24d10827cac4beb1abeb98','old-run',2,'0452239af6fbe73ed7b21cf0e9db82890cac4731a8b6a4921c3349b95be4699c','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','a8989317cf9287850260df63e5c4946861b8092ff02634fb4b3dab4f9fb1da56','a130a9a4785f14da3d233bb2bdedab62780db176af033fdb9462fda102bfedd6','{"base_digest":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","code_version":"0.1.0","method":"fedit + sgd","metrics":{"train_loss":-0.5},"parent":"0452239af6fbe73ed7b21cf0e9db82890cac4731a8b6a4921c3349b95be4699c","participants":2,"privacy":null,"round_number":2,"run_id":"old-run","servable":true,"spec":{"alpha":4.0,"dtype":"F32","head":null,"modules":[{"alpha":4.0,"d_in":4,"d_out":4,"fan_in_fan_out":false,"name":"layer","rank":2}],"peft_type":"lora","rank":2,"use_rslora":false},"task":{},"weights_digest":"a8989317cf9287850260df63e5c4946861b8092ff02634fb4b3dab4f9fb1da56"}','2026-01-01 00:00:00.000000');
CREATE INDEX ix_registry_versions_run ON registry_versions (run_id, round_number);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('registry_versions',3);
COMMIT;
